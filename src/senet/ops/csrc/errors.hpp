// No exception may leave the library: it would terminate Python. Each entry point returns a number, 0 for success.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>

namespace {

enum Error : int32_t { NONE, OUT_OF_MEMORY, FAILED };

// The message of the calling thread's last failure.
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
        return failed(OUT_OF_MEMORY, "there is not enough memory for the workspace");
    } catch (const std::exception &error) {
        return failed(FAILED, error.what());
    } catch (...) {
        return failed(FAILED, "an exception without a message");
    }
}

// An exception must not leave a parallel region either. A thread that cannot allocate its workspace does nothing, and
// check() throws after the region. All other allocations happen outside parallel regions.
class Rooms {
    std::atomic<bool> lack{false};

  public:
    // The result of `find`, or null if it throws.
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
