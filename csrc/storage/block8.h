// 8 bits in memory for each entry, and a float32 scale for each block of 64 entries of a row. Definition and names:
// epi_kernels/storage/block8.py. Sums, products, quotients and square roots, each rounded once.
#pragma once

#include <cmath>
#include <cstdint>

#include "../bits.h"
#include "../importance.h"

namespace epi {
namespace {

struct Block8 {
    using Memory = uint8_t;

    static constexpr int64_t BLOCK = 64;
    static constexpr int32_t LARGEST = 126;  // the code after it is that of NaN

    // all bits of a code, in 32 bits
    static inline float load(uint32_t code, float scale) {
        const auto magnitude = static_cast<int32_t>(code & 127u);
        const auto wide = static_cast<float>(magnitude);
        const uint32_t bits = selected(magnitude > LARGEST, 0x7fc00000u, bits_of(wide * wide * scale));
        return float_of(bits | ((code & 128u) << 24));
    }

    static inline float scale_of(float largest) {
        const float scale = largest / static_cast<float>(LARGEST * LARGEST);
        return selected(bits_of(scale) < NEGLIGIBLE, 0.0f, scale);
    }

    static inline float inverse_of(float scale) { return selected(scale > 0.0f, 1.0f / scale, 0.0f); }

    // Return the code of a value, in 32 bits. `finite`: the value is known to be. positive: no value but 0 gets code 0.
    //
    // Where the rounded root is the whole number k although the root is below k, the code is k all the same: k is the
    // root plus less than the least that noise can leave of the way to it. Likewise no code is above LARGEST: three
    // roundings lift the largest value by less than the least noise.
    template <bool positive, bool finite>
    static inline uint32_t store(float value, float inverse, uint32_t noise) {
        const uint32_t bits = bits_of(value) & ~SIGN;
        const bool usable = finite || bits < INFINITE;
        const float units = float_of(finite ? bits : selected(usable, bits, 0u)) * inverse;
        const auto root = static_cast<int32_t>(sqrtf(units));
        const auto below = static_cast<float>(root);
        // (2 root + 1) times the noise, of which 15 bits and one half are used; all of this is exact
        const float share = static_cast<float>(static_cast<int32_t>(noise | 1u)) * (below * 0x1p-15f + 0x1p-16f);
        int32_t code = root + (units - below * below > share ? 1 : 0);
        if constexpr (positive) {
            const int32_t least = bits != 0 ? 1 : 0;
            code = code < least ? least : code;
        }
        const auto found = static_cast<uint32_t>(code);
        return (finite ? found : selected(usable, found, LARGEST + 1u)) | ((bits_of(value) & SIGN) >> 24);
    }
};

// How the entries of a tensor are cut into blocks. Blocks have numbers, row after row: those of their scales.
struct Blocks {
    int64_t row;  // entries of a row; 0: the rows do not matter, since no block is short, or there are none
    int64_t of_row;

    explicit Blocks(int64_t entries)
        : row(entries % Block8::BLOCK ? entries : 0), of_row((entries + Block8::BLOCK - 1) / Block8::BLOCK) {}

    // The first entry of a block; the number of all blocks gives the number of all entries.
    int64_t begin(int64_t block) const {
        if (row == 0) return block * Block8::BLOCK;
        const int64_t within = block % of_row * Block8::BLOCK;
        return block / of_row * row + within;
    }

    // The block that an entry begins.
    int64_t at(int64_t entry) const {
        if (row == 0) return entry / Block8::BLOCK;
        return entry / row * of_row + entry % row / Block8::BLOCK;
    }

    // The number of blocks of a tensor.
    int64_t count(int64_t size) const {
        if (row == 0) return (size + Block8::BLOCK - 1) / Block8::BLOCK;
        return size / row * of_row;
    }
};

}  // namespace
}  // namespace epi
