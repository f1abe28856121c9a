// Writing packed weights, and reading single rows of them (embeddings). Plain C++: speed comes
// from the memory, and from the callers' threads.
#include "packing.h"

#include <math.h>
#include <string.h>

namespace shoal {
namespace {

float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float from_bf16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

uint16_t to_bf16(float value) {
    uint32_t bits = to_bits(value);
    if (value != value) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_f16(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + 0x38000000));
    float small = float(rest) * 0x1p-24f;
    return sign ? -small : small;
}

uint16_t to_f16(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    float size = fabsf(value);
    if (!(size < 65520.f)) return uint16_t(sign | (size != size ? 0x7e00 : 0x7bff)); // saturates
    if (size < 0x1p-14f) return uint16_t(sign | uint32_t(lrintf(size * 0x1p24f)));
    uint32_t magnitude = (bits & 0x7fffffff) - 0x38000000;
    return uint16_t(sign | (magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// One row of a checkpoint, one group of 32 at a time.
struct Group {
    int8_t codes[kGroup]; // int8: signed; int4: 0 to 15
    float scale, minimum;
};

struct Q4_0 { uint16_t scale; uint8_t codes[16]; };
struct Q4_1 { uint16_t scale, minimum; uint8_t codes[16]; };
struct Q8_0 { uint16_t scale; int8_t codes[32]; };

struct Source {
    int32_t kind;
    const uint8_t* rows;
    const float *scales, *minimums;
    int64_t cols, num_groups;

    int64_t row_bytes() const {
        switch (kind) {
        case SHOAL_FROM_F32: return cols * 4;
        case SHOAL_FROM_BF16:
        case SHOAL_FROM_F16: return cols * 2;
        case SHOAL_FROM_Q4_0: return cols / 32 * int64_t(sizeof(Q4_0));
        case SHOAL_FROM_Q4_1: return cols / 32 * int64_t(sizeof(Q4_1));
        case SHOAL_FROM_Q8_0: return cols / 32 * int64_t(sizeof(Q8_0));
        case SHOAL_FROM_INT8: return cols;
        default: return cols / 2;
        }
    }

    float value(int64_t row, int64_t col) const {
        const uint8_t* data = rows + row * row_bytes();
        if (kind == SHOAL_FROM_F32) return reinterpret_cast<const float*>(data)[col];
        uint16_t half = reinterpret_cast<const uint16_t*>(data)[col];
        return kind == SHOAL_FROM_BF16 ? from_bf16(half) : from_f16(half);
    }

    void nibbles(const uint8_t* packed, Group& group) const {
        for (int i = 0; i < 16; i++) {
            group.codes[i] = int8_t(packed[i] & 15);
            group.codes[16 + i] = int8_t(packed[i] >> 4);
        }
    }

    // Columns [32 g, 32 g + 32), fewer at the end: then the rest are zeros.
    Group group(int64_t row, int64_t g) const {
        Group out = {};
        const uint8_t* data = rows + row * row_bytes();
        if (kind == SHOAL_FROM_Q4_0) {
            const Q4_0& block = reinterpret_cast<const Q4_0*>(data)[g];
            nibbles(block.codes, out);
            out.scale = from_f16(block.scale);
            return out;
        }
        if (kind == SHOAL_FROM_Q4_1) {
            const Q4_1& block = reinterpret_cast<const Q4_1*>(data)[g];
            nibbles(block.codes, out);
            out.scale = from_f16(block.scale);
            out.minimum = from_f16(block.minimum);
            return out;
        }
        if (kind == SHOAL_FROM_Q8_0) {
            const Q8_0& block = reinterpret_cast<const Q8_0*>(data)[g];
            memcpy(out.codes, block.codes, 32);
            out.scale = from_f16(block.scale);
            return out;
        }
        int64_t first = g * kGroup, last = first + kGroup < cols ? first + kGroup : cols;
        for (int64_t col = first; col < last; col++) {
            out.codes[col - first] =
                kind == SHOAL_FROM_INT8 ? reinterpret_cast<const int8_t*>(data)[col]
                                        : int8_t(col % 2 ? data[col / 2] >> 4 : data[col / 2] & 15);
        }
        int64_t at = row * num_groups + first / (cols / num_groups);
        out.scale = scales[at];
        out.minimum = minimums ? minimums[at] : 0.f;
        return out;
    }
};

void put_floats(uint8_t* panel, int32_t format, int lane, const Source& source, int64_t row) {
    auto* wide = reinterpret_cast<float*>(panel) + lane;
    auto* narrow = reinterpret_cast<uint16_t*>(panel) + 2 * lane;
    if (format == SHOAL_BF16 && source.kind == SHOAL_FROM_BF16) {
        auto* from = reinterpret_cast<const uint16_t*>(source.rows + row * source.row_bytes());
        for (int64_t col = 0; col < source.cols; col++)
            narrow[col / 2 * 2 * kLanes + col % 2] = from[col];
        return;
    }
    for (int64_t col = 0; col < source.cols; col++) {
        float value = source.value(row, col);
        if (format == SHOAL_F32) wide[col * kLanes] = value;
        else narrow[col / 2 * 2 * kLanes + col % 2] = to_bf16(value);
    }
}

void put_groups(uint8_t* panel, int32_t format, int lane, const Source& source, int64_t row) {
    int64_t num_groups = (source.cols + kGroup - 1) / kGroup;
    int64_t code_bytes = format == SHOAL_INT8 ? 16 * kGroup : 8 * kGroup; // of a group
    for (int64_t g = 0; g < num_groups; g++) {
        Group group = source.group(row, g);
        uint8_t* pair = panel + g / 2 * pair_bytes(format);
        uint8_t* codes = pair + g % 2 * code_bytes + 4 * lane;
        for (int v = 0; v < (format == SHOAL_INT8 ? 8 : 4); v++) {
            for (int j = 0; j < 4; j++) {
                int8_t code = group.codes[4 * v + j];
                codes[64 * v + j] = format == SHOAL_INT8
                                        ? uint8_t(code + 128)
                                        : uint8_t(code | group.codes[16 + 4 * v + j] << 4);
            }
        }
        auto* scales = reinterpret_cast<uint16_t*>(pair + 2 * code_bytes) + g % 2 * kLanes + lane;
        scales[0] = to_f16(group.scale);
        if (format == SHOAL_INT4_MIN) scales[2 * kLanes] = to_f16(group.minimum);
    }
}

// Whether these rows can be had in that format without rounding codes.
bool fits(int32_t source, int32_t format, const float* minimums) {
    switch (source) {
    case SHOAL_FROM_Q4_0: return format == SHOAL_INT4;
    case SHOAL_FROM_Q4_1: return format == SHOAL_INT4_MIN;
    case SHOAL_FROM_INT4: return format == (minimums ? SHOAL_INT4_MIN : SHOAL_INT4);
    case SHOAL_FROM_Q8_0:
    case SHOAL_FROM_INT8: return format == SHOAL_INT8;
    default: return !is_integer(format);
    }
}

float read_value(const shoal_weight& weight, const uint8_t* panel, int lane, int64_t col) {
    if (weight.format == SHOAL_F32) return reinterpret_cast<const float*>(panel)[col * kLanes + lane];
    if (weight.format == SHOAL_BF16) {
        auto* narrow = reinterpret_cast<const uint16_t*>(panel);
        return from_bf16(narrow[(col / 2 * kLanes + lane) * 2 + col % 2]);
    }
    int64_t code_bytes = weight.format == SHOAL_INT8 ? 16 * kGroup : 8 * kGroup;
    int64_t g = col / kGroup, i = col % kGroup;
    const uint8_t* pair = panel + g / 2 * pair_bytes(weight.format);
    const uint8_t* codes = pair + g % 2 * code_bytes + 4 * lane;
    auto* scales =
        reinterpret_cast<const uint16_t*>(pair + 2 * code_bytes) + g % 2 * kLanes + lane;
    float scale = from_f16(scales[0]);
    if (weight.format == SHOAL_INT8) return float(int(codes[64 * (i / 4) + i % 4]) - 128) * scale;
    uint8_t both = codes[64 * (i % 16 / 4) + i % 4];
    int code = i < 16 ? both & 15 : both >> 4;
    if (weight.format == SHOAL_INT4) return float(code - 8) * scale;
    return float(code) * scale + from_f16(scales[2 * kLanes]);
}

} // namespace

void read_row(const shoal_weight& weight, int64_t row, float* out) {
    const uint8_t* panel = weight.data + row / kLanes * panel_bytes(weight.format, weight.cols);
    for (int64_t col = 0; col < weight.cols; col++)
        out[col] = read_value(weight, panel, int(row % kLanes), col);
}

} // namespace shoal

using namespace shoal;

int64_t shoal_cpu_packed_bytes(int32_t format, int64_t rows, int64_t cols) {
    return round_up(rows, kLanes) / kLanes * panel_bytes(format, cols);
}

int32_t shoal_cpu_pack(uint8_t* data, int32_t format, int64_t cols, int32_t kind, const void* rows,
                       const float* scales, const float* minimums, int64_t num_groups,
                       const int64_t* places, int64_t n) {
    if (!fits(kind, format, minimums)) return -1;
    Source source = {kind, static_cast<const uint8_t*>(rows), scales, minimums, cols, num_groups};
    for (int64_t row = 0; row < n; row++) {
        uint8_t* panel = data + places[row] / kLanes * panel_bytes(format, cols);
        int lane = int(places[row] % kLanes);
        if (is_integer(format)) put_groups(panel, format, lane, source, row);
        else put_floats(panel, format, lane, source, row);
    }
    return 0;
}
