// Chunks of many tensors, taken by a few threads: both two thousand small tensors and one large one are shared evenly.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "runs.h"

namespace epi {

// entries in a chunk: long enough that the streams of a sweep run far ahead, short enough to share out evenly
constexpr int64_t CHUNK = int64_t{1} << 16;
constexpr int64_t CHUNK_BLOCKS = CHUNK / Block8::BLOCK;

// below this many entries a second thread costs more time than it saves
constexpr int64_t SMALL = int64_t{1} << 16;

struct Chunk {
    int64_t tensor, begin, end;
};

class Chunks {
  public:
    template <typename Tensor>
    Chunks(const Tensor* tensors, int64_t count) : sizes_(count), rows_(count), first_(count + 1, 0) {
        for (int64_t i = 0; i < count; ++i) {
            const Blocks blocks = blocks_of(tensors[i]);
            sizes_[i] = tensors[i].size;
            rows_[i] = blocks.row;
            entries_ += sizes_[i];
            first_[i + 1] = first_[i] + (blocks.count(sizes_[i]) + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
        }
    }

    // Give the next chunk that no thread has taken; return false if no chunk is left.
    bool take(Chunk* chunk) {
        const int64_t number = next_.fetch_add(1, std::memory_order_relaxed);
        if (number >= first_.back()) return false;
        const int64_t tensor = std::upper_bound(first_.begin(), first_.end(), number) - first_.begin() - 1;
        const int64_t block = (number - first_[tensor]) * CHUNK_BLOCKS;
        const Blocks blocks(rows_[tensor]);
        *chunk = {tensor, blocks.begin(block), std::min(blocks.begin(block + CHUNK_BLOCKS), sizes_[tensor])};
        return true;
    }

    // The number of threads that are worth waking up, at most `threads`.
    int32_t useful_threads(int32_t threads) const {
        if (entries_ < SMALL) return 1;
        return static_cast<int32_t>(std::min<int64_t>(std::max(threads, 1), first_.back()));
    }

  private:
    std::vector<int64_t> sizes_;
    std::vector<int64_t> rows_;   // of `Blocks`
    std::vector<int64_t> first_;  // first chunk's number for each tensor; then the number of chunks
    std::atomic<int64_t> next_{0};
    int64_t entries_ = 0;
};

// Call work(data) on `threads` threads at once, including this one, and wait for all.
void call_on_threads(int32_t threads, void (*work)(void*), void* data);

// Run worker(chunks) on threads; each worker takes chunks until none is left.
template <typename Worker>
void run(Chunks& chunks, int32_t threads, Worker worker) {
    struct Call {
        Chunks& chunks;
        Worker& worker;
    } call = {chunks, worker};
    const auto work = [](void* data) {
        auto* call = static_cast<Call*>(data);
        call->worker(call->chunks);
    };
    call_on_threads(chunks.useful_threads(threads), work, &call);
}

}  // namespace epi
