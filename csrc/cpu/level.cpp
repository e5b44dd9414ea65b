// The table of kernels for one SIMD level.
#include "kernels.h"

namespace epi {

const Kernels EPI_LEVEL::kernels = {EPI_LEVEL::sweep,           EPI_LEVEL::importance, EPI_LEVEL::gradient_sums,
                                    EPI_LEVEL::score_histogram, EPI_LEVEL::lock,       EPI_LEVEL::gather};

}  // namespace epi
