// Loops over several threads, made for a machine that is rarely alone.
//
// Work is taken in chunks from a counter by whoever is there: the caller always is, and waits only for threads that have
// taken some. So a thread that another program keeps from running delays nobody but by the chunk that it may hold.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

inline void pause_briefly() {  // for whoever else the core runs
#if defined(__aarch64__)
    asm volatile("yield");
#else
    __builtin_ia32_pause();
#endif
}

class Threads {
  public:
    static inline std::atomic<int64_t> default_count{1};
    static inline thread_local int64_t count_here = 0;  // of the calling thread; 0: the default
    const int64_t count;

    explicit Threads(int64_t count) : count(count) {
        for (int64_t i = 1; i < count; i++) helpers.emplace_back([this] { help(); });
    }

    ~Threads() {
        is_ending = true;
        round.fetch_add(1);
        wake();
        for (auto& helper : helpers) helper.join();
    }

    void run(void (*function)(void*, int64_t), void* data, int64_t n) {
        if (helpers.empty()) {
            for (int64_t i = 0; i < n; i++) function(data, i);
            return;
        }
        work = {function, data, n, std::max<int64_t>(1, n / (8 * count))};
        next = 0;
        is_open = true;
        round.fetch_add(1);
        if (num_asleep > 0) wake();
        take();
        is_open = false;
        while (num_inside > 0) pause_briefly();
    }

  private:
    struct Work {
        void (*function)(void*, int64_t);
        void* data;
        int64_t n, chunk;
    };

    static constexpr auto SPIN = std::chrono::microseconds(50);  // a few kernels' time, then sleep

    Work work{};
    std::vector<std::thread> helpers;
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<uint32_t> round{0};
    std::atomic<bool> is_open{false}, is_ending{false};
    alignas(64) std::atomic<int64_t> num_inside{0};
    std::atomic<int64_t> num_asleep{0};

#ifdef __cpp_lib_atomic_wait
    void sleep(uint32_t seen) { round.wait(seen); }
    void wake() { round.notify_all(); }
#else  // g++ 10
    void sleep(uint32_t) { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }
    void wake() {}
#endif

    void take() {
        for (int64_t i; (i = next.fetch_add(work.chunk)) < work.n;)
            for (int64_t end = std::min(work.n, i + work.chunk); i < end; i++) work.function(work.data, i);
    }

    void help() {
        for (uint32_t seen = 0;;) {
            seen = wait(seen);
            if (is_ending) return;
            // Work is read only from inside, and changed only while it is not open and nobody is: so a helper that
            // comes late finds it closed, or the next one open.
            num_inside.fetch_add(1);
            if (is_open) take();
            num_inside.fetch_sub(1);
        }
    }

    uint32_t wait(uint32_t seen) {
        auto end = std::chrono::steady_clock::now() + SPIN;
        for (int i = 0; round == seen; i++) {
            pause_briefly();
            if (i % 16 == 0 && std::chrono::steady_clock::now() > end) {
                num_asleep.fetch_add(1);
                sleep(seen);
                num_asleep.fetch_sub(1);
            }
        }
        return round;
    }
};

// Those of the calling thread, which end with it; in a forked child, which has not got them, new ones.
inline Threads& my_threads() {
    struct Owner {
        Threads* threads = nullptr;
        pid_t process = 0;
        void drop() {
            if (threads && process == getpid()) delete threads;
        }
        ~Owner() { drop(); }
    };
    static thread_local Owner owner;
    int64_t wanted = Threads::count_here ? Threads::count_here : Threads::default_count.load();
    if (!owner.threads || owner.process != getpid() || owner.threads->count != wanted) {
        owner.drop();
        owner.threads = new Threads(wanted);
        owner.process = getpid();
    }
    return *owner.threads;
}

// f(i) for i from 0 to n - 1, in any order and at the same time; fewer than `least` are not worth other threads' waking.
template <class F>
void parallel_for(int64_t n, int64_t least, F&& f) {
    auto call = [](void* data, int64_t i) { (*(std::remove_reference_t<F>*)data)(i); };
    if (n < least)
        for (int64_t i = 0; i < n; i++) f(i);
    else
        my_threads().run(call, &f, n);
}
