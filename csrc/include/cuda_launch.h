// What csrc/cuda/*.cu launches: pointers, sizes and a stream, no torch. Nothing here allocates,
// waits, or throws; each returns what the launch returned. All pointers are to the current device
// unless a comment says host.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// --- optimizer -----------------------------------------------------------------------------------

// Elements that one block takes: the sums of a tensor are made of one partial sum a chunk.
#define BERT_FAST_CHUNK 16384

enum BertFastDtype { BERT_FAST_FLOAT = 0, BERT_FAST_HALF = 1, BERT_FAST_BFLOAT16 = 2 };

// A parameter, its gradient and its state; a host struct. Each tensor is dense and all have the
// same order of elements.
typedef struct BertFastParam {
  void* param;           // (numel) param_dtype
  const void* grad;      // (numel) grad_dtype
  float* exp_avg;        // (numel)
  float* exp_avg_sq;     // (numel)
  float* master;         // (numel) what is updated, param its rounded copy; NULL: param itself
  float* step;           // () how many steps it has had; one more afterwards
  const float* lr_dev;   // () the learning rate; NULL: lr
  int64_t numel;
  float lr;
  float weight_decay;
  int32_t param_dtype;   // enum BertFastDtype
  int32_t grad_dtype;
} BertFastParam;

// What a step has in common for all parameters; a host struct.
typedef struct BertFastStep {
  double beta1, beta2, eps;
  double max_norm;          // gradients are scaled down to this norm; used where norm is given
  const float* norm;        // () the norm of all gradients (bert_fast_grad_norm); NULL: no clipping
  const float* grad_scale;  // () gradients are this many times too large; NULL: 1
  const float* found_inf;   // () not 0: nothing is changed; NULL: 0
  int32_t always_adapt;     // LAMB: adapt parameters without weight decay too
} BertFastStep;

// The chunks of these parameters, by their numel: host arithmetic. bert_fast_grad_norm wants that
// many floats in `sums`, bert_fast_lamb twice as many.
int64_t bert_fast_num_chunks(const BertFastParam* params, int64_t count);

// norm () := || all gradients || / grad_scale; reads grad, grad_dtype and numel.
cudaError_t bert_fast_grad_norm(const BertFastParam* params, int64_t count, const float* grad_scale,
                                float* sums, float* norm, cudaStream_t stream);

// One step of AdamW; `scalars` has room for 4 * count floats.
cudaError_t bert_fast_adamw(const BertFastParam* params, int64_t count, const BertFastStep* step,
                            float* scalars, cudaStream_t stream);

// One step of LAMB; `sums` has room for two floats a chunk.
cudaError_t bert_fast_lamb(const BertFastParam* params, int64_t count, const BertFastStep* step,
                           float* scalars, float* sums, cudaStream_t stream);

// --- unpad ---------------------------------------------------------------------------------------

// From a mask (B, L) of bytes, not 0 where there is a token, where the tokens are: in one launch.
typedef struct BertFastUnpad {
  const uint8_t* mask;
  int64_t B, L, stride_B, stride_L;  // B * L < 2^31
  int64_t* rows;        // (num_rows) b * L + l of each token, ascending
  int64_t num_rows;     // room in rows: B * L always suffices; more tokens are lost
  int32_t* cu_seqlens;  // (B + 1)
  int32_t* work;        // (2 + T / tile + B, 4), the work list of attention; NULL: none
  int64_t work_rows;    // room in work: 2 + B * L / tile + B always suffices
  int32_t tile;         // rows of an entry of it
  int32_t* scratch;     // (2, B)
  int64_t* totals;      // (2): T, and the longest sequence; NULL: num_rows is T, and work_rows is
                        // 2 + T / tile + B: what no token fills is 0
} BertFastUnpad;

cudaError_t bert_fast_unpad(const BertFastUnpad* args, cudaStream_t stream);

#ifdef __cplusplus
}  // extern "C"
#endif
