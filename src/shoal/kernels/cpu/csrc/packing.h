// How a packed weight lies in memory, for those who write it and those who read it.
//
//     panel = 16 rows (lanes), all columns, read front to back; rows and columns padded by zeros
//     f32    per column          16 floats
//     bf16   per 2 columns       16 lanes x 2
//     int8   per 64 columns      2 groups x 8 vectors of 16 lanes x 4 bytes (code + 128) | scales
//     int4   per 64 columns      2 groups x 4 vectors of 16 lanes x 4 bytes              | scales
//            byte j of a vector v: column 4 v + j in the low four bits, 16 + 4 v + j in the high
//     scales 2 groups x 16 lanes fp16; int4 with minimums: then as many minimums
#pragma once
#include <stdint.h>

#include "shoal_cpu.h"

namespace shoal {

constexpr int kLanes = 16;      // rows of a panel
constexpr int kGroup = 32;      // columns that share a scale
constexpr int kPair = 2 * kGroup;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline bool is_integer(int32_t format) { return format >= SHOAL_INT8; }

// Columns as stored.
inline int64_t padded_cols(int32_t format, int64_t cols) {
    return round_up(cols, is_integer(format) ? kPair : 2);
}

// Bytes of two groups of 16 rows.
inline int64_t pair_bytes(int32_t format) {
    switch (format) {
    case SHOAL_INT8: return 16 * kPair + 64;
    case SHOAL_INT4: return 8 * kPair + 64;
    default: return 8 * kPair + 128; // SHOAL_INT4_MIN
    }
}

inline int64_t panel_bytes(int32_t format, int64_t cols) {
    int64_t padded = padded_cols(format, cols);
    if (is_integer(format)) return padded / kPair * pair_bytes(format);
    return padded * kLanes * (format == SHOAL_F32 ? 4 : 2);
}

// One row of a packed weight; compiled without any instruction set's flags.
void read_row(const shoal_weight& weight, int64_t row, float* out);

} // namespace shoal
