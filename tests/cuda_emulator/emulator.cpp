// The blocks and threads of a launch, on the CPU.
#include <cuda_runtime.h>
#include <pthread.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <thread>

namespace emulator {
namespace {

constexpr size_t kStack = 1 << 16;
constexpr int kLanes = 32;

struct Fiber {
  ucontext_t start;
  jmp_buf at;  // where it waits; to jump costs no call of the system, as swapcontext does
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Waits waits = kDone;
};

struct Warp {
  char mine[kLanes * 16], all[kLanes * 16];
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  pthread_barrier_t* grid = nullptr;
  size_t running = 0;
};

thread_local Block block;

// A fiber runs one thread after another, of this block and of those after it.
void enter() {
  while (true) {
    (*block.body)();
    wait(kDone);
  }
}

// Let a fiber run until it waits.
__attribute__((noinline)) void resume(size_t i) {
  Fiber& fiber = *block.fibers[i];
  block.running = i;
  threadIdx = {static_cast<unsigned>(i), 0, 0};
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack.get();
  fiber->start.uc_stack.ss_size = kStack;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, enter, 0);
  return fiber;
}

bool all_wait(size_t from, size_t to, Waits what, bool done_too) {
  bool any = false;
  for (size_t i = from; i < to; ++i) {
    const Waits waits = block.fibers[i]->waits;
    any = any || waits == what;
    if (waits != what && !(done_too && waits == kDone)) return false;
  }
  return any;
}

void release(size_t from, size_t to, Waits what) {
  for (size_t i = from; i < to; ++i) {
    if (block.fibers[i]->waits == what) block.fibers[i]->waits = kRuns;
  }
}

// Run a warp until it waits for others: one that runs ahead, as far as a barrier lets it.
void run_warp(size_t first, size_t last, std::vector<size_t>& order, std::mt19937_64* chance) {
  while (true) {
    order.resize(last - first);
    std::iota(order.begin(), order.end(), first);
    if (chance != nullptr) std::shuffle(order.begin(), order.end(), *chance);
    for (const size_t i : order) {
      if (block.fibers[i]->waits == kRuns) resume(i);
    }
    if (!all_wait(first, last, kForWarp, false)) return;
    Warp& warp = block.warps[first / kLanes];
    std::memcpy(warp.all, warp.mine, sizeof(warp.all));
    release(first, last, kForWarp);
  }
}

// Let go whoever waits for what has come; false where nobody can.
bool release_some(size_t threads) {
  bool some = false;
  if (all_wait(0, threads, kForBlock, true)) {
    release(0, threads, kForBlock);
    some = true;
  }
  if (all_wait(0, threads, kForGrid, false)) {
    if (block.grid == nullptr) fail("a grid that waits, and was not launched together");
    if (block.grid != nullptr) pthread_barrier_wait(block.grid);
    release(0, threads, kForGrid);
    some = true;
  }
  return some;
}

void run_block(unsigned index, unsigned blocks, unsigned threads, pthread_barrier_t* grid,
               const std::function<void()>& body, uint64_t seed) {
  blockIdx = {index, 0, 0};
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  block.body = &body;
  block.grid = grid;
  block.warps.resize((threads + kLanes - 1) / kLanes);
  while (block.fibers.size() < threads) block.fibers.push_back(make_fiber());
  for (unsigned i = 0; i < threads; ++i) block.fibers[i]->waits = kRuns;
  std::mt19937_64 chance(seed + index);
  std::vector<size_t> order, warps(block.warps.size());
  std::iota(warps.begin(), warps.end(), 0);
  while (true) {
    if (seed != 0) std::shuffle(warps.begin(), warps.end(), chance);
    for (const size_t w : warps) {
      const size_t first = w * kLanes, last = std::min<size_t>(first + kLanes, threads);
      run_warp(first, last, order, seed == 0 ? nullptr : &chance);
    }
    if (all_wait(0, threads, kDone, true)) return;
    if (!release_some(threads)) {
      fail("threads that wait for others which do not come");
      block.fibers.clear();  // they stand in the middle of the kernel
      if (grid != nullptr) pthread_barrier_wait(grid);  // the other blocks do not wait for this one
      return;
    }
  }
}

}  // namespace

State& state() {
  static State the_state;
  return the_state;
}

void fail(const char* why) { state().error = why; }

void wait(Waits what) {
  Fiber& self = *block.fibers[block.running];
  self.waits = what;
  if (_setjmp(self.at) == 0) _longjmp(block.scheduler, 1);
}

void* exchange(const void* mine, size_t bytes) {
  const size_t thread = block.running;
  Warp& warp = block.warps[thread / kLanes];
  std::memcpy(warp.mine + thread % kLanes * bytes, mine, bytes);
  wait(kForWarp);
  return warp.all;
}

cudaError_t run(unsigned blocks, unsigned threads, cudaStream_t stream, bool together,
                const std::function<void()>& body) {
  State& all = state();
  all.one_stream = all.one_stream && (all.launches == 0 || all.stream == stream);
  all.stream = stream;
  ++all.launches;
  if (blocks == 0) fail("a launch without blocks");
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937_64 chance(all.seed);
  if (all.seed != 0) std::shuffle(order.begin(), order.end(), chance);
  if (together) {
    pthread_barrier_t grid;
    pthread_barrier_init(&grid, nullptr, std::max(blocks, 1u));
    std::vector<std::thread> running;
    for (const unsigned b : order) {
      running.emplace_back([&, b] { run_block(b, blocks, threads, &grid, body, all.seed); });
    }
    for (std::thread& thread : running) thread.join();
    pthread_barrier_destroy(&grid);
  } else {
    for (const unsigned b : order) run_block(b, blocks, threads, nullptr, body, all.seed);
  }
  return all.error == nullptr ? cudaSuccess : cudaErrorUnknown;
}

}  // namespace emulator

extern "C" {

// Begin anew: the seed of the order (0: as they are numbered), and how many blocks run together.
void emulator_reset(uint64_t seed, int processors) {
  emulator::state() = {};
  emulator::state().seed = seed;
  emulator::state().processors = processors;
}
int emulator_launches() { return emulator::state().launches; }
void* emulator_stream() {
  return emulator::state().one_stream ? emulator::state().stream : nullptr;
}
const char* emulator_error() { return emulator::state().error; }

}  // extern "C"
