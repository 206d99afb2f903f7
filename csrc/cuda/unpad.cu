// unpad: rows, cu_seqlens and the work list of a mask, in one launch.
//
// Each block takes a range of sequences, a warp one sequence at a time. All count their tokens; all
// blocks wait for each other once; then each knows, from the lengths of all, where its own begin.
// The place of a sequence in the work list is the number of tiles before it, which its warp counts
// over all sequences: O(B^2) comparisons, no sort. Bytes: the mask twice, 8 T of rows, 16 of each
// entry; bound by the latency of the launch and of that one wait.
#include <cooperative_groups.h>

#include "cuda_call.cuh"
#include "cuda_device.cuh"
#include "cuda_launch.h"

namespace bert_fast::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 4;  // that a lane reads before it counts them

__device__ __forceinline__ int nonzero_bytes(uint32_t word) {
  word |= (word & 0x7f7f7f7fu) + 0x7f7f7f7fu;
  return __popc(word & 0x80808080u);
}

// How many columns of a row of the mask are not 0; the whole warp calls and knows it.
__device__ int count_row(const uint8_t* row, int64_t L, int64_t stride, int lane) {
  int count = 0;
  if (stride == 1 && reinterpret_cast<uintptr_t>(row) % sizeof(uint4) == 0 &&
      L % static_cast<int64_t>(sizeof(uint4)) == 0) {
    const auto* words = reinterpret_cast<const uint4*>(row);
    for (int64_t i = lane; i < L / static_cast<int64_t>(sizeof(uint4)); i += kWarp) {
      const uint4 w = __ldg(words + i);
      count += nonzero_bytes(w.x) + nonzero_bytes(w.y) + nonzero_bytes(w.z) + nonzero_bytes(w.w);
    }
  } else {
    for (int64_t l = lane; l < L; l += kWarp) count += row[l * stride] != 0;
  }
  return warp_sum(count);
}

// What all sequences have together.
struct Totals {
  int before;  // tokens of the sequences before `first`
  int tokens, longest;
  int tiles, tiles_of_long;  // entries of the work list, and those of sequences of several
};

__device__ Totals count_all(const int* lengths, const int* tiles, int64_t B, int64_t first) {
  __shared__ int longest[kWarps];
  Totals mine = {0, 0, 0, 0, 0};
  for (int64_t b = threadIdx.x; b < B; b += kThreads) {
    const int length = lengths[b];
    mine.before += b < first ? length : 0;
    mine.tokens += length;
    mine.longest = length > mine.longest ? length : mine.longest;
    mine.tiles += tiles[b];
    mine.tiles_of_long += tiles[b] > 1 ? tiles[b] : 0;
  }
  const int lane = threadIdx.x % kWarp;
  mine.longest = warp_max(mine.longest);
  if (lane == 0) longest[threadIdx.x / kWarp] = mine.longest;
  Totals all;
  all.before = block_sum<kThreads>(mine.before);  // it waits for all threads
  all.tokens = block_sum<kThreads>(mine.tokens);
  all.tiles = block_sum<kThreads>(mine.tiles);
  all.tiles_of_long = block_sum<kThreads>(mine.tiles_of_long);
  all.longest = warp_max(lane < kWarps ? longest[lane] : 0);
  return all;
}

// cu_seqlens of sequences first to last, which `before` tokens precede; each thread calls.
__device__ void add_up(const int* lengths, int64_t first, int64_t last, int before, int* cu) {
  __shared__ int ends[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t start = first; start < last; start += kThreads) {
    const int64_t b = start + threadIdx.x;
    int end = b < last ? lengths[b] : 0;  // of this sequence, among those of its warp
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAll, end, step);
      if (lane >= step) end += other;
    }
    if (lane == kWarp - 1) ends[warp] = end;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) end += before + all;
      all += ends[w];
    }
    if (b < last) cu[b + 1] = end;
    before += all;
    __syncthreads();  // before the next round writes `ends`, or the caller reads `cu`
  }
}

// The tokens of a row of the mask, its columns 0 to L, from place `at` of rows; the warp calls.
__device__ void write_rows(const uint8_t* row, int64_t L, int64_t stride, int64_t index, int at,
                           int end, int64_t* rows, int64_t num_rows, int lane) {
  for (int64_t start = 0; at < end; start += kColumns * kWarp) {  // not past the last token
    bool token[kColumns];
    for (int i = 0; i < kColumns; ++i) {
      const int64_t l = start + i * kWarp + lane;
      token[i] = l < L && row[l * stride] != 0;
    }
    for (int i = 0; i < kColumns; ++i) {
      const unsigned tokens = __ballot_sync(kAll, token[i]);
      const int place = at + __popc(tokens & ((1u << lane) - 1));
      if (token[i] && place < num_rows) rows[place] = index + start + i * kWarp + lane;
      at += __popc(tokens);
    }
  }
}

// The entries of sequence b, which begins at row `at`; the warp calls.
__device__ void write_entries(const BertFastUnpad& a, const int* lengths, const int* tiles,
                              int64_t b, int at, int lane) {
  const int length = lengths[b];
  const int first = at < a.num_rows ? at : static_cast<int>(a.num_rows);
  const int rest = static_cast<int>(a.num_rows) - first;
  int place = 0;  // entries before: of longer sequences, and of earlier ones as long
  for (int64_t other = lane; other < a.B; other += kWarp) {
    const int theirs = lengths[other];
    if (theirs > length || (theirs == length && other < b)) place += tiles[other];
  }
  place = 1 + warp_sum(place);
  auto* entries = reinterpret_cast<int4*>(a.work);
  for (int i = lane; i < tiles[b]; i += kWarp) {
    if (place + i < a.work_rows) {
      entries[place + i] =
          make_int4(static_cast<int>(b), first, length < rest ? length : rest, i * a.tile);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    unpad_kernel(const __grid_constant__ BertFastUnpad a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto B = static_cast<unsigned>(a.B);
  const int64_t share = B / gridDim.x + (B % gridDim.x != 0);
  const int64_t first = share * blockIdx.x < a.B ? share * blockIdx.x : a.B;
  const int64_t last = first + share < a.B ? first + share : a.B;
  int* lengths = a.scratch;
  int* tiles = a.scratch + a.B;

  for (int64_t b = first + warp; b < last; b += kWarps) {
    const int length = count_row(a.mask + b * a.stride_B, a.L, a.stride_L, lane);
    if (lane == 0) {
      lengths[b] = length;
      tiles[b] = length / a.tile + (length % a.tile != 0);
    }
  }
  cooperative_groups::this_grid().sync();

  const Totals all = count_all(lengths, tiles, a.B, first);
  add_up(lengths, first, last, all.before, a.cu_seqlens);
  const bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
  if (is_first) {
    a.cu_seqlens[0] = 0;
    if (a.totals != nullptr) {
      a.totals[0] = all.tokens;
      a.totals[1] = all.longest;
    }
  }
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t places = static_cast<int64_t>(gridDim.x) * kThreads;
  if (a.totals == nullptr) {  // the caller says how many: no row may point outside if it is fewer
#pragma unroll 1
    for (int64_t i = all.tokens + place; i < a.num_rows; i += places) a.rows[i] = 0;
  }
  for (int64_t b = first + warp; b < last; b += kWarps) {
    if (lengths[b] == 0) continue;
    const int end = a.cu_seqlens[b + 1], at = end - lengths[b];
    write_rows(a.mask + b * a.stride_B, a.L, a.stride_L, b * a.L, at, end, a.rows, a.num_rows,
               lane);
    if (a.work != nullptr) write_entries(a, lengths, tiles, b, at, lane);
  }
  if (a.work == nullptr) return;

  auto* entries = reinterpret_cast<int4*>(a.work);
  const int room = static_cast<int>(a.work_rows) - 1;
  const int used = all.tiles < room ? all.tiles : room;
  const int of_long = all.tiles_of_long < room ? all.tiles_of_long : room;
  if (is_first) entries[0] = make_int4(used, used, of_long, 0);
  int64_t end = 2 + all.tokens / a.tile + a.B;
  end = a.totals == nullptr || a.work_rows < end ? a.work_rows : end;
#pragma unroll 1
  for (int64_t i = 1 + used + place; i < end; i += places) entries[i] = make_int4(0, 0, 0, 0);
}

}  // namespace
}  // namespace bert_fast::cuda

extern "C" cudaError_t bert_fast_unpad(const BertFastUnpad* args, cudaStream_t stream) {
  using namespace bert_fast::cuda;
  return launch_together(unpad_kernel, (args->B + kWarps - 1) / kWarps, kThreads, stream, *args);
}
