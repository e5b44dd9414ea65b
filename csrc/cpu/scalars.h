// The scalars of a row: those of every sweep, then the rule's.
#pragma once

#include <cstring>

#include "../schema.h"

namespace epi {
namespace {

struct Scalars {
    const float* values;

    epi_sweep_scalars of_sweep() const { return read<epi_sweep_scalars>(values); }

    template <typename Rule>
    typename Rule::Scalars of_rule() const {
        return read<typename Rule::Scalars>(values + sizeof(epi_sweep_scalars) / sizeof(float));
    }

    template <typename Struct>
    static Struct read(const float* from) {
        static_assert(sizeof(Struct) <= EPI_SCALARS * sizeof(float));
        Struct made;
        std::memcpy(&made, from, sizeof made);
        return made;
    }
};

}  // namespace
}  // namespace epi
