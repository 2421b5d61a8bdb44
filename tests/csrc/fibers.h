// Threads of an emulated GPU as fibers of one host thread: which of them runs next is the emulation's to choose.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <vector>

namespace emulator {

[[noreturn]] inline void fail(const char* why, long long a = 0, long long b = 0) {
    std::fprintf(stderr, "emulator: %s (%lld, %lld)\n", why, a, b);
    std::fflush(nullptr);
    std::_Exit(3);
}

class Fibers {
 public:
    enum class Order { kFirstCome, kLastCome };

    Fibers(int count, Order order) : order_(order), contexts_(count) {
        stacks_ = static_cast<char*>(
            mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks_ == MAP_FAILED) fail("no memory for the stacks of fibers", count);
        for (int i = 0; i < count; ++i)
            mprotect(stacks_ + i * kStack, kGuard, PROT_NONE);
    }
    ~Fibers() { munmap(stacks_, contexts_.size() * kStack); }
    Fibers(const Fibers&) = delete;

    // Runs `body(fiber)` as every fiber. Where none can run, `idle()` does what is still outstanding elsewhere; false
    // if that is nothing.
    void run(const std::function<void(int)>& body, const std::function<bool()>& idle) {
        body_ = &body;
        for (int i = 0; i < size(); ++i)
            prepare(i);
        do {
            while (!ready_.empty()) {
                const bool first = order_ == Order::kFirstCome;
                running_ = first ? ready_.front() : ready_.back();
                first ? ready_.pop_front() : ready_.pop_back();
                swapcontext(&scheduler_, &contexts_[running_]);
            }
        } while (idle());
        if (finished_ != size()) fail("threads wait for each other: finished, of all", finished_, size());
    }

    int size() const { return static_cast<int>(contexts_.size()); }
    int running() const { return running_; }
    // Leaves the running fiber until somebody resumes it.
    void suspend() { swapcontext(&contexts_[running_], &scheduler_); }
    void resume(int fiber) { ready_.push_back(fiber); }
    void resume(std::vector<int>& fibers) {
        for (const int fiber : fibers)
            resume(fiber);
        fibers.clear();
    }

 private:
    static constexpr std::size_t kStack = 1 << 19, kGuard = 1 << 12;

    void prepare(int fiber) {
        ucontext_t& context = contexts_[fiber];
        getcontext(&context);
        context.uc_stack.ss_sp = stacks_ + fiber * kStack + kGuard;
        context.uc_stack.ss_size = kStack - kGuard;
        context.uc_link = &scheduler_;
        const auto self = reinterpret_cast<std::uintptr_t>(this);
        makecontext(&context, reinterpret_cast<void (*)()>(&Fibers::enter), 3, static_cast<unsigned>(self >> 32),
                    static_cast<unsigned>(self), static_cast<unsigned>(fiber));
        resume(fiber);
    }

    static void enter(unsigned high, unsigned low, unsigned fiber) {
        Fibers& self = *reinterpret_cast<Fibers*>(std::uintptr_t{high} << 32 | low);
        // ASan takes a context with a stack for a new one, and would clear its shadow at every switch to it.
        self.contexts_[fiber].uc_stack.ss_size = 0;
        (*self.body_)(static_cast<int>(fiber));
        ++self.finished_;
    }

    Order order_;
    std::vector<ucontext_t> contexts_;
    char* stacks_;
    std::deque<int> ready_;
    const std::function<void(int)>* body_ = nullptr;
    ucontext_t scheduler_{};
    int running_ = 0, finished_ = 0;
};

}  // namespace emulator
