// Loops over several threads, made for a machine that is rarely alone.
//
// Work is taken in chunks from a counter by whoever is there: the caller always is, and waits only for threads that
// have taken some. So a thread that another program keeps from running delays nobody but by the chunk that it may hold,
// which the caller, after a while, lets it finish on its own core.

#pragma once

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif
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

    explicit Threads(int64_t count) : count(count), helpers(count - 1) {
        for (Helper& helper : helpers) helper.thread = std::thread([&] { help(helper); });
    }

    ~Threads() {
        is_ending = true;
        round.fetch_add(1);
        wake();
        for (Helper& helper : helpers) helper.thread.join();
    }

    void run(void (*function)(void*, int64_t, int64_t), void* data, int64_t n) {
        if (helpers.empty()) return function(data, 0, n);
        work = {function, data, n};
        next = 0;
        auto start = Clock::now();
        is_open = true;
        round.fetch_add(1);
        if (num_asleep > 0) wake();
        take();
        is_open = false;
        wait_for_helpers(start);
    }

  private:
    struct Work {
        void (*function)(void*, int64_t, int64_t);
        void* data;
        int64_t n;
    };

    struct Helper {
        std::thread thread;
        std::atomic<int> core{-1};  // where it works; -1: it does not
    };
    using Clock = std::chrono::steady_clock;

    static constexpr auto SPIN = std::chrono::microseconds(50);       // a few kernels' time, then sleep
    static constexpr auto PATIENCE = std::chrono::microseconds(200);  // much less than another's time slice

    Work work{};
    std::vector<Helper> helpers;
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

    // Large chunks, which read memory in order, and at last small ones, so that all end at about the same time.
    void take() {
        auto size = [&] { return std::max<int64_t>(1, (work.n - next) / (2 * count)); };
        for (int64_t chunk = size(), i; (i = next.fetch_add(chunk)) < work.n; chunk = size())
            work.function(work.data, i, std::min(work.n, i + chunk));
    }

    void wait_for_helpers(Clock::time_point start) {
        auto now = Clock::now();
        auto end = now + std::max<Clock::duration>(PATIENCE, (now - start) / 4);  // the time of some chunks
        for (int i = 0; num_inside > 0; i++) {
            pause_briefly();
            if (i % 16 == 0 && Clock::now() > end)
                for (Helper& helper : helpers) finish_here(helper);
        }
    }

#ifdef __linux__
    static int this_core() { return sched_getcpu(); }

    static bool move(Helper& helper, int core) {
        cpu_set_t cores;
        CPU_ZERO(&cores);
        CPU_SET(core, &cores);
        return pthread_setaffinity_np(helper.thread.native_handle(), sizeof cores, &cores) == 0;
    }

    // The caller's core is free meanwhile. Moved back at once, or else the two would go on beside each other.
    static void finish_here(Helper& helper) {
        int core = helper.core;
        cpu_set_t usual;
        auto handle = helper.thread.native_handle();
        bool is_moved = core >= 0 && core != this_core() &&
                        pthread_getaffinity_np(handle, sizeof usual, &usual) == 0 && move(helper, this_core());
        while (helper.core >= 0) sched_yield();
        if (is_moved) {
            move(helper, core);
            pthread_setaffinity_np(handle, sizeof usual, &usual);
        }
    }
#else
    static int this_core() { return 0; }
    static void finish_here(Helper&) {}
#endif

    void help(Helper& self) {
        for (uint32_t seen = 0;;) {
            seen = wait(seen);
            if (is_ending) return;
            // Work is read only from inside, and changed only while it is not open and nobody is: so a helper that
            // comes late finds it closed, or the next one open.
            self.core = this_core();
            num_inside.fetch_add(1);
            if (is_open) take();
            self.core = -1;
            num_inside.fetch_sub(1);
        }
    }

    uint32_t wait(uint32_t seen) {
        auto end = Clock::now() + SPIN;
        for (int i = 0; round == seen; i++) {
            pause_briefly();
            if (i % 16 == 0 && Clock::now() > end) {
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

// f(begin, end) for ranges that make up 0 to n, in any order and at the same time; fewer than `least` are not worth
// other threads' waking.
template <class F>
void parallel_ranges(int64_t n, int64_t least, F&& f) {
    auto call = [](void* data, int64_t begin, int64_t end) { (*(std::remove_reference_t<F>*)data)(begin, end); };
    if (n < least)
        f(0, n);
    else
        my_threads().run(call, &f, n);
}

// f(i) for i from 0 to n - 1, likewise.
template <class F>
void parallel_for(int64_t n, int64_t least, F&& f) {
    parallel_ranges(n, least, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) f(i);
    });
}
