// How the entries of a tensor are shared out: chunks for the threads, and runs that fit the first-level cache. Neither
// cuts a block of entries that share a scale.
#pragma once

#include <cstdint>

#include "../schema.h"
#include "../storage/block8.h"

namespace epi {
namespace {

// Return the blocks of a tensor.
inline Blocks blocks_of(const epi_sweep_tensor& tensor) {
    bool any = tensor.lock_scales != nullptr;
    for (const float* const scales : tensor.scales) any = any || scales;
    return Blocks(any ? tensor.row : 0);
}

inline Blocks blocks_of(const epi_importance_tensor& tensor) { return Blocks(tensor.scales ? tensor.row : 0); }

inline Blocks blocks_of(const epi_score_tensor& tensor) { return Blocks(tensor.scales ? tensor.row : 0); }

inline Blocks blocks_of(const epi_sums_tensor&) { return Blocks(0); }

inline Blocks blocks_of(const epi_gather_tensor&) { return Blocks(0); }

inline Blocks blocks_of(const epi_positions_tensor&) { return Blocks(0); }

// entries of a run at most; the buffers of a sweep stay in the first-level cache
constexpr int64_t RUN = 1024;

// Consecutive entries of a tensor, and the number of the block that they begin with.
struct Run {
    int64_t begin, size, block;
};

// The runs of a chunk, in order.
class Runs {
  public:
    // most: entries of a run, a multiple of a block; a chunk as a whole may be longer.
    Runs(const Blocks& blocks, int64_t begin, int64_t end, int64_t most)
        : blocks_(blocks), next_(begin), end_(end), block_(blocks.at(begin)), step_(most / Block8::BLOCK) {}

    // Give the next run; return false if there is none.
    bool take(Run* run) {
        if (next_ >= end_) return false;
        const int64_t until = blocks_.begin(block_ + step_);
        *run = {next_, (until < end_ ? until : end_) - next_, block_};
        next_ += run->size;
        block_ += step_;
        return true;
    }

  private:
    const Blocks& blocks_;
    int64_t next_, end_, block_, step_;
};

}  // namespace
}  // namespace epi
