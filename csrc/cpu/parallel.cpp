// Threads. The process already has torch's OpenMP threads, which stay awake between operations of torch. The OpenMP
// runtime is found by name at run time, so that no second runtime is ever linked.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <system_error>
#include <thread>

namespace epi {
namespace {

// A child of fork() has none of OpenMP's threads, and libgomp would wait for them for ever. It can start new threads.
bool forked = false;

const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void call_on_threads(int32_t threads, void (*work)(void*), void* data) {
    if (threads <= 1) return work(data);

    // libgomp's entry point for a parallel region, stable since GOMP_4.0: (function, argument, threads, flags)
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (parallel && watching == 0 && !forked) return parallel(work, data, static_cast<unsigned>(threads), 0);

    std::vector<std::thread> others;
    try {
        for (int32_t i = 1; i < threads; ++i) others.emplace_back(work, data);
    } catch (const std::system_error&) {
        // no more threads can be started: those that run take all chunks
    }
    work(data);
    for (std::thread& other : others) other.join();
}

}  // namespace epi
