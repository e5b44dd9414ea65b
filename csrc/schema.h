/* Made by `make schema`: change epi_kernels/schema.py, or a rule, and run that. */
#ifndef EPI_SCHEMA_H
#define EPI_SCHEMA_H

#include <stdint.h>

#define EPI_VERSION 619532316

#define EPI_SLOTS 3
#define EPI_SCALARS 12
#define EPI_CHUNK_BITS 40

enum epi_dtype {
    EPI_FLOAT32,
    EPI_BFLOAT16,
    EPI_FLOAT16,
    EPI_BLOCK8,
};

enum epi_lock_in {
    EPI_LOCK_NONE,
    EPI_LOCK_IMPORTANCE,
    EPI_LOCK_SLOT,
    EPI_LOCK_STATIC,
};

enum epi_rule {
    EPI_RULE_ADAMW,
    EPI_RULE_LION,
    EPI_RULES,
};

typedef struct {
    float sign;
    float importance_beta;
    float one_minus_importance_beta;
    float step;
} epi_sweep_scalars;

/* Of a rule: the positions of its slots; how many there are, and how many of them every parameter has; the
 * one that can serve as the importance, or -1; and its scalars. */

enum epi_adamw {
    EPI_ADAMW_EXP_AVG = 0,
    EPI_ADAMW_EXP_AVG_SQ = 1,
    EPI_ADAMW_MAX_EXP_AVG_SQ = 2,
    EPI_ADAMW_SLOTS = 3,
    EPI_ADAMW_REQUIRED = 2,
    EPI_ADAMW_IMPORTANCE_SLOT = 1,
};

typedef struct {
    float decay;
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float step_size;
    float bias_correction2_sqrt;
    float eps;
} epi_adamw_scalars;

enum epi_lion {
    EPI_LION_EXP_AVG = 0,
    EPI_LION_SLOTS = 1,
    EPI_LION_REQUIRED = 1,
    EPI_LION_IMPORTANCE_SLOT = -1,
};

typedef struct {
    float decay;
    float lr;
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
} epi_lion_scalars;

/* Rows of the host. */

typedef struct {
    /* entries */
    int64_t size;
    /* written */
    void* param;
    const void* grad;
    /* of the rule, written; NULL: an optional one that is not there */
    void* slots[EPI_SLOTS];
    /* signed importance, written; with EPI_LOCK_STATIC int8, read; else NULL */
    void* lock;
    /* of a slot in blocks of 8 bits, written; else NULL */
    float* scales[EPI_SLOTS];
    /* of an importance in blocks of 8 bits, written; else NULL */
    float* lock_scales;
    /* of a bfloat16 parameter whose weight has more bits, written; else NULL */
    void* rest;
    /* of the noise */
    int64_t key;
    /* offset of the first entry in the whole tensor */
    int64_t first;
    /* entries that lie side by side in the whole tensor; 0: all is rounded to nearest */
    int64_t run;
    /* entries of the whole tensor between two runs */
    int64_t gap;
    /* entries of a row, whose blocks share scales; at least 1 */
    int64_t row;
    /* result: entries whose squared gradient is NaN or infinite */
    int64_t nonfinite;
    /* enum epi_dtype */
    int32_t param_dtype;
    /* enum epi_dtype */
    int32_t grad_dtype;
    /* enum epi_dtype of each slot */
    int32_t slot_dtypes[EPI_SLOTS];
    /* enum epi_dtype of an importance */
    int32_t lock_dtype;
    /* of an entry of the rest: 16 or 8 */
    int32_t rest_bits;
    /* 1: round the parameter stochastically */
    int32_t stochastic;
    /* enum epi_lock_in */
    int32_t lock_in;
    /* epi_sweep_scalars, then the rule's */
    float scalars[EPI_SCALARS];
} epi_sweep_tensor;

typedef struct {
    /* selected entries */
    int64_t size;
    /* written at the offsets alone */
    void* param;
    const void* grad;
    /* of the selected entries from `param`, in entries; distinct */
    const void* param_offsets;
    const void* grad_offsets;
    /* of the rule, [size] each, written */
    void* slots[EPI_SLOTS];
    /* [size], of a bfloat16 parameter whose weight has more bits, written; else NULL */
    void* rest;
    /* of the selected entries in row-major order, for the noise */
    const void* positions;
    /* of the noise */
    int64_t key;
    /* offset of the first entry in the whole tensor */
    int64_t first;
    /* entries that lie side by side in the whole tensor; 0: all is rounded to nearest */
    int64_t run;
    /* entries of the whole tensor between two runs */
    int64_t gap;
    /* enum epi_dtype */
    int32_t param_dtype;
    /* enum epi_dtype */
    int32_t grad_dtype;
    /* enum epi_dtype of each slot */
    int32_t slot_dtypes[EPI_SLOTS];
    /* of an entry of the rest: 16 or 8 */
    int32_t rest_bits;
    /* 1: round the parameter stochastically */
    int32_t stochastic;
    /* 1: int64, 0: int32 */
    int32_t wide_offsets;
    /* epi_sweep_scalars, then the rule's */
    float scalars[EPI_SCALARS];
} epi_gather_tensor;

typedef struct {
    /* entries */
    int64_t size;
    /* signed; written where there is a gradient */
    void* importance;
    /* NULL: the range alone */
    const void* grad;
    /* of an importance in blocks of 8 bits; else NULL */
    float* scales;
    /* of the noise */
    int64_t key;
    /* offset of the first entry in the whole tensor */
    int64_t first;
    /* entries that lie side by side in the whole tensor; 0: all is rounded to nearest */
    int64_t run;
    /* entries of the whole tensor between two runs */
    int64_t gap;
    /* entries of a row, whose blocks share scales; at least 1 */
    int64_t row;
    /* result: entries whose squared gradient is NaN or infinite */
    int64_t nonfinite;
    /* enum epi_dtype */
    int32_t grad_dtype;
    /* enum epi_dtype */
    int32_t importance_dtype;
    int32_t layer;
    float beta;
    float one_minus_beta;
    /* the parameter's clock, for the noise */
    float step;
} epi_importance_tensor;

typedef struct {
    /* entries */
    int64_t size;
    /* written; NULL: only the squares are summed */
    float* sum;
    /* written */
    float* square_sum;
    const void* grad;
    /* enum epi_dtype */
    int32_t grad_dtype;
} epi_sums_tensor;

typedef struct {
    /* entries */
    int64_t size;
    /* signed; sign bits written by epi_lock */
    void* importance;
    /* of an importance in blocks of 8 bits; else NULL */
    const float* scales;
    /* entries of a row, whose blocks share scales; at least 1 */
    int64_t row;
    /* results of epi_lock */
    int64_t locked;
    int64_t newly_locked;
    int64_t released;
    /* range of the tensor's layer */
    float low;
    float high;
    /* 0: the score is S itself */
    int32_t normalized;
    int32_t budget;
    /* enum epi_dtype */
    int32_t importance_dtype;
} epi_score_tensor;

typedef struct {
    /* positions */
    int64_t size;
    /* of a whole tensor; epi_put writes it at the positions alone */
    void* memory;
    /* of the whole tensor */
    int64_t entries;
    /* in the whole tensor, in entries; strictly increasing */
    const int64_t* positions;
    /* [size], one for each position; epi_take writes them */
    void* values;
    /* result: 1: a position is outside of the tensor, and nothing was moved */
    int32_t outside;
    /* of an entry of `memory` and `values`: 1, 2, 4 or 8 */
    int32_t entry_bytes;
} epi_positions_tensor;

/* A row of a device's table of scores. */

typedef struct {
    int64_t size;
    int64_t importance;
    int64_t scales;
    int64_t row;
    int64_t layer;
    int64_t budget;
    int64_t importance_dtype;
    int64_t aligned;
} epi_score_row;

#endif
