// float32 in memory: entries are kept unchanged.
#pragma once

namespace epi {
namespace {

struct Float32 {
    using Memory = float;
    static inline float load(float value) { return value; }
    static inline float store(float value) { return value; }
};

}  // namespace
}  // namespace epi
