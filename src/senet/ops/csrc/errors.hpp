// No exception leaves the library: Python would end without a word. Each entry returns a number instead, 0 for success.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>

namespace {

enum Error : int32_t { NONE, OUT_OF_MEMORY, FAILED };

// What is said of the calling thread's last failure.
inline thread_local char failure[256];

inline int32_t failed(Error error, const char *why) noexcept {
    std::snprintf(failure, sizeof failure, "%s", why);
    return error;
}

template <typename Body> int32_t guarded(Body body) noexcept {
    try {
        body();
        return NONE;
    } catch (const std::bad_alloc &) {
        return failed(OUT_OF_MEMORY, "there is not enough memory for the working space");
    } catch (const std::exception &error) {
        return failed(FAILED, error.what());
    } catch (...) {
        return failed(FAILED, "an exception without a message");
    }
}

// Nor may an exception leave a parallel region: a thread that finds no room in it does nothing, and the caller is told
// behind the region. All other allocations are made outside.
class Rooms {
    std::atomic<bool> lack{false};

  public:
    // What `find` returns, or null if it cannot.
    template <typename Find> auto ask(Find find) noexcept -> decltype(find()) {
        try {
            return find();
        } catch (...) {
            lack = true;
            return nullptr;
        }
    }

    void check() const {
        if (lack) throw std::bad_alloc();
    }
};

}  // namespace
