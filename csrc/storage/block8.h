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

    static inline float load(uint8_t code, float scale) {
        const auto magnitude = static_cast<int32_t>(code & 127u);
        const auto wide = static_cast<float>(magnitude);
        const float value = wide * wide * scale;
        const uint32_t bits = selected(magnitude > LARGEST, 0x7fc00000u, bits_of(value));
        return float_of(bits | (static_cast<uint32_t>(code & 128u) << 24));
    }

    // The bits of a magnitude for the maximum of a block: the order of the bits is that of the values.
    static inline int32_t finite_bits(float value) {
        const auto bits = static_cast<int32_t>(bits_of(value) & ~SIGN);
        return bits < static_cast<int32_t>(INFINITE) ? bits : 0;
    }

    static inline float scale_of(int32_t largest) {
        const float scale = float_of(static_cast<uint32_t>(largest)) / static_cast<float>(LARGEST * LARGEST);
        return selected(bits_of(scale) < NEGLIGIBLE, 0.0f, scale);
    }

    static inline float inverse_of(float scale) { return selected(scale > 0.0f, 1.0f / scale, 0.0f); }

    // noise: 16 bits. positive: no value but 0 gets code 0.
    template <bool positive>
    static inline uint8_t store(float value, float inverse, uint32_t noise) {
        const auto bits = static_cast<int32_t>(bits_of(value) & ~SIGN);
        const bool finite = bits < static_cast<int32_t>(INFINITE);
        const float units = float_of(finite ? static_cast<uint32_t>(bits) : 0u) * inverse;
        auto code = static_cast<int32_t>(sqrtf(units));
        // the root of a number just below a square is rounded to the whole number
        auto below = static_cast<float>(code);
        code -= below * below > units ? 1 : 0;
        below = static_cast<float>(code);
        const float share = (static_cast<float>(static_cast<int32_t>(noise >> 1)) + 0.5f) * 0x1p-15f;
        code += units > below * below + share * (2.0f * below + 1.0f) ? 1 : 0;
        code = code > LARGEST ? LARGEST : code;
        if constexpr (positive) {
            const int32_t least = bits != 0 ? 1 : 0;
            code = code < least ? least : code;
        }
        code = finite ? code : LARGEST + 1;
        return static_cast<uint8_t>(static_cast<uint32_t>(code) | ((bits_of(value) & SIGN) >> 24));
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
