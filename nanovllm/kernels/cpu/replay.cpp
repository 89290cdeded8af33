// Runs a sequence of recorded calls without Python between them.

#include "common.h"

// How many threads work for the calling thread, and for those that have not said.
EXPORT void set_num_threads(int64_t count) { Threads::count_here = count; }
EXPORT void set_default_threads(int64_t count) { Threads::default_count = count; }

struct Call {
    void (*function)(const int64_t*);  // a call_NAME
    const int64_t* arguments;
};

EXPORT void replay(const Call* calls, int64_t num_calls) {
    for (int64_t i = 0; i < num_calls; i++) calls[i].function(calls[i].arguments);
}
