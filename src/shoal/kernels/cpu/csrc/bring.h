// Experts that are not all in memory: rounds of those that are, brought there in turn.
//
//     lists | bring | inputs | gate, up | inputs | down | bring | inputs | ...
//
// Rounds go through the experts in the order of their numbers, so a token's sums are made as if all
// were there at once.
#pragma once
#include "passes.h"

namespace {

constexpr int kRoundPhases = 4; // behind that which brings

// Shares of this rank: [first, last).
struct Slots {
    int64_t first, last;
};

// The first tile of the lists from `slot` on.
inline int64_t first_tile(const Scratch& s, const shoal_experts& experts, int64_t slot) {
    int64_t low = 0, high = s.list_starts[experts.num_shares + 1];
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (s.expert_tiles[middle].slot < slot) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Moves `slots` on to those that are in memory next; false: it failed, and every thread must leave.
inline bool bring_round(Pass& pass, const shoal_experts& experts, Slots* slots) {
    const int64_t* starts = pass.f.scratch.list_starts;
    int64_t& until = pass.f.scratch.list_starts[experts.num_shares + 2];
    int64_t first = slots->last;
    pass.expect(nullptr, Into::kStore);
    bool is_there = pass.alone([&] { // the round before is over for all
        memset(pass.work + 1, 0, kRoundPhases * sizeof(Work));
        until = experts.bring(experts.bring_context, &experts, int32_t(first), starts);
        return until <= first || until > experts.num_shares;
    });
    *slots = {first, until};
    return is_there;
}

} // namespace
