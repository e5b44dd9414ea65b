// The noise of stochastic rounding. Definition and names: epi_kernels/storage/noise.py; every backend has these bits.
//
// The words of an entry's slots have a mixed offset in common: it is computed once for each entry, a word in one
// multiplication from there.
#pragma once

#include <cstdint>

#include "../bits.h"

namespace epi {
namespace {

// C_0; C_1 of the words 0, 1 and 2
constexpr uint32_t NOISE_FIRST = 0x7FEB352Du;
constexpr uint32_t NOISE_LAST[] = {0x846CA68Bu, 0x9E3779B1u, 0xC2B2AE3Du};

// whose noise it is: the rule's slots have NOISE_OF_SLOT in their order
constexpr int NOISE_IMPORTANCE = 2;
constexpr int NOISE_PARAM = 3;
constexpr int NOISE_OF_SLOT[] = {0, 1, 4};

inline uint32_t mixed_offset(uint32_t x) {
    const uint32_t z = (x ^ (x >> 16)) * NOISE_FIRST;
    return z ^ (z >> 15);
}

inline uint32_t noise_word(uint32_t mixed, uint32_t last) {
    const uint32_t word = mixed * last;
    return word ^ (word >> 16);
}

inline uint32_t mix(uint32_t x) { return noise_word(mixed_offset(x), NOISE_LAST[0]); }

// The noise of one slot: the constant of its word, and the shift of its half of the word.
struct NoiseOf {
    uint32_t last;
    int32_t shift;

    explicit NoiseOf(int slot) : last(NOISE_LAST[slot / 2]), shift(slot % 2 * 16) {}

    // 16 bits
    uint32_t operator()(uint32_t mixed) const { return (noise_word(mixed, last) >> shift) & 0xffffu; }
};

// Where the entries of a tensor lie in the whole tensor, and the key of the noise in this step.
struct Place {
    uint32_t key;
    int64_t first, run, gap;

    template <typename Tensor>
    static Place of(const Tensor& tensor, float step) {
        const auto low = static_cast<uint32_t>(tensor.key);
        const auto high = static_cast<uint32_t>(static_cast<uint64_t>(tensor.key) >> 32);
        return {mix(low + mix(high + mix(bits_of(step)))), tensor.first, tensor.run, tensor.gap};
    }

    // The offset in the whole tensor of a local offset.
    int64_t offset(int64_t local) const { return first + local + (gap ? local / run * gap : 0); }

    // What the low words of offsets with this high word are combined with.
    uint32_t of_high(int64_t offset) const { return mix(key + static_cast<uint32_t>(offset >> 32)); }

    // Write the mixed offsets of the `size` entries from the local offset `begin` on. They are cut where a run ends and
    // where the high word changes; between the cuts the loop has 32-bit lanes alone.
    void fill(uint32_t* __restrict mixed, int64_t begin, int64_t size) const {
        for (int64_t done = 0; done < size;) {
            const int64_t at = offset(begin + done);
            int64_t side_by_side = (int64_t{1} << 32) - (at & 0xffffffff);
            if (gap) side_by_side = least(side_by_side, run - (begin + done) % run);
            const int64_t count = least(side_by_side, size - done);
            const auto low = static_cast<uint32_t>(at);
            const uint32_t high = of_high(at);
            uint32_t* __restrict to = mixed + done;
            for (int32_t j = 0; j < static_cast<int32_t>(count); ++j)
                to[j] = mixed_offset((low + static_cast<uint32_t>(j)) ^ high);
            done += count;
        }
    }

    // Write the mixed offsets of entries at any local offsets.
    template <typename Offset>
    void gather(uint32_t* __restrict mixed, const Offset* locals, int64_t size) const {
        int64_t known = -1;
        uint32_t high = 0;
        for (int64_t j = 0; j < size; ++j) {
            const int64_t at = offset(locals[j]);
            if (at >> 32 != known) {
                known = at >> 32;
                high = of_high(at);
            }
            mixed[j] = static_cast<uint32_t>(at) ^ high;
        }
        for (int64_t j = 0; j < size; ++j) mixed[j] = mixed_offset(mixed[j]);
    }

  private:
    static int64_t least(int64_t left, int64_t right) { return left < right ? left : right; }
};

}  // namespace
}  // namespace epi
