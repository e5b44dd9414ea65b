// The CUDA kernels without CUDA: every thread of a block is a thread of the CPU, and the blocks of a launch run one
// after the other. KERNELS names the source, in which `launch(kernel, ...)(` stands for `kernel<<<...>>>(`. See
// test_cuda_on_host.py.
#include <array>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__ static
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    uint32_t x;
};
static thread_local Index threadIdx, blockIdx;

using cudaStream_t = void*;
struct cudaFuncAttributes {};
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
template <typename Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
static int cudaGetLastError() { return cudaSuccess; }

// Threads wait here for one another.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int64_t round = round_;
        if (++arrived_ == threads_) {
            arrived_ = 0;
            ++round_;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return round_ != round; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable all_;
    const int threads_;
    int arrived_ = 0;
    int64_t round_ = 0;
};

constexpr int WARP = 32;

struct Warp {
    Barrier barrier{WARP};
    std::array<uint32_t, WARP> values{};
};

struct Block {
    explicit Block(int threads) : barrier(threads) {
        for (int i = 0; i < threads; i += WARP) warps.push_back(std::make_unique<Warp>());
    }

    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;
};

static Block* block;
static int left_out = -1;  // the barrier of a kernel that no thread waits at: 0 is the first
static thread_local int passed;

static void __syncthreads() {
    if (passed++ != left_out) block->barrier.wait();
}

static uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
    Warp& warp = *block->warps[threadIdx.x / WARP];
    warp.values[threadIdx.x % WARP] = value;
    warp.barrier.wait();
    uint32_t sum = 0;
    for (const uint32_t one : warp.values) sum += one;
    warp.barrier.wait();
    return sum;
}

template <typename Number>
Number atomicAdd(Number* address, Number value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <typename Kernel>
auto launch(Kernel kernel, uint32_t blocks, int threads, int, cudaStream_t) {
    return [=](auto... arguments) {
        Block here(threads);
        block = &here;
        std::vector<std::thread> all;
        for (int i = 0; i < threads; ++i)
            all.emplace_back([&here, kernel, blocks, i, arguments...] {
                threadIdx.x = i;
                for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
                    passed = 0;
                    kernel(arguments...);
                    here.barrier.wait();
                }
            });
        for (auto& thread : all) thread.join();
    };
}

#include KERNELS

// Count the scores of a tensor of two chunks, for a build that looks for races: `cuda_on_host [barrier to leave out]`.
int main(int count, char** arguments) {
    if (count > 1) left_out = std::atoi(arguments[1]);
    constexpr int64_t SIZE = HISTOGRAM_CHUNK + 777;
    std::vector<float> importance(SIZE);
    for (int64_t i = 0; i < SIZE; ++i) importance[i] = i % 5 ? static_cast<float>(i % 1009) : 0.0f;
    epi_score_row row{};
    row.size = SIZE;
    row.importance = reinterpret_cast<int64_t>(importance.data());
    const int64_t chunks[] = {0, 1}, selection[] = {0, 5};
    const float range[] = {0.0f, 1000.0f};
    std::vector<int64_t> counts(1 << LARGEST_DIGIT);
    epi_cuda_score_histogram(reinterpret_cast<const int64_t*>(&row), chunks, 2, range, selection, nullptr,
                             31 - LARGEST_DIGIT, LARGEST_DIGIT, counts.data(), nullptr);
    int64_t sum = 0;
    for (const int64_t one : counts) sum += one;
    std::printf("%lld of %lld\n", static_cast<long long>(sum), static_cast<long long>(SIZE));
}
