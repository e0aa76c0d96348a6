// The emulator's scheduler: one block at a time, a fiber per thread.
//
// A fiber runs until it must wait; then the scheduler, on that fiber's own stack, picks the next one. A warp's turn
// lasts until all of its lanes wait or have ended. Nothing is decided before all threads wait: what then cannot go on
// is an error that names two places.
//
// This file is compiled without the sanitizers' instrumentation, and tells them about fibers instead. TSan then sees
// CUDA's rules: only __syncthreads and __syncwarp order memory, and nothing orders blocks of a launch.
#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>

#include "emulator.h"

#if defined(PARA_EMULATOR_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(PARA_EMULATOR_THREAD)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace para::emulator {

unsigned lane;
std::atomic<uint64_t> bytes_read, bytes_written;

namespace {

constexpr unsigned LANES = 32, MAX_THREADS = 1024;
constexpr size_t PAGE = 16 << 10;  // a multiple of every machine's
#ifdef PARA_EMULATOR_ADDRESS
constexpr size_t STACK = 256 << 10;  // red zones make frames several times larger
#else
constexpr size_t STACK = 64 << 10;
#endif

// TSan takes what a fiber does for ordered. Blocks share fibers, so neighbours at least must not.
#ifdef PARA_EMULATOR_THREAD
constexpr unsigned POOLS = 2;
#else
constexpr unsigned POOLS = 1;
#endif

// Without a sanitizer nothing else sees a write past shared memory.
#if defined(PARA_EMULATOR_ADDRESS) || defined(PARA_EMULATOR_THREAD)
constexpr size_t GUARD = 0;
#else
constexpr size_t GUARD = 64;
#endif

// A context that was left, to be jumped to.
#if !defined(__clang__) || defined(__x86_64__)
using Jump = void* [5];
#define PARA_SAVE __builtin_setjmp
#define PARA_JUMP __builtin_longjmp
#else
using Jump = jmp_buf;
#define PARA_SAVE _setjmp
#define PARA_JUMP _longjmp
#endif

struct Context {
    Jump jump;
    bool entered = true;
    const void* stack = nullptr;  // its lowest address
    size_t stack_bytes = 0;
    [[maybe_unused]] void* sanitizers = nullptr;  // ASan's fake stack, or TSan's fiber
};

// What a thread waits for. Its partners are those that must come to the same place.
struct Wait {
    enum Kind : uint8_t { block, warp, shuffle, vote } kind;
    const char* word;  // in the kernel's source
    Place place;
    unsigned mask;  // of lanes
};

struct Fiber : Context {
    const unsigned warp, lane;
    bool running = false;  // the kernel: it has begun and has not ended
    uint3 thread{};
    Wait wait{};
    unsigned source = 0;
    uint64_t value = 0;
    void* memory;  // the stack, and before it the page where it overflows

    explicit Fiber(size_t number);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
};

// Each a set of lanes. Those alive have not ended: they are ready, or chosen for this turn, or wait, or run just now.
struct Warp {
    unsigned alive = 0, ready = 0, turn = 0;
    unsigned waiting = 0;           // for other lanes, not for the block
    unsigned at = 0, stride = 1;    // the turn's order: at, at + stride, … modulo 32
    unsigned barriers[LANES] = {};  // passed, by the lowest lane that takes part
};

struct Shared {
    const void* site;  // nullptr: the dynamic shared memory
    unsigned char* memory;
    size_t bytes;
};

struct Failure {
    std::string text;
};
struct Cancelled {};  // thrown in all threads that wait when one has failed: their stacks must unwind

struct Scheduler {
    std::mutex busy;  // one launch at a time
    uint64_t seed, random = 1;
    size_t shared_limit = 227 << 10;
    std::vector<Launch> launches;
    std::map<const void*, std::string> names;
    std::vector<std::unique_ptr<Fiber>> pools[POOLS];

    // The launch:
    Launch launch;
    void (*run)(void*) = nullptr;
    void* args = nullptr;
    size_t dynamic_bytes = 0;
    std::string failure;  // of the first thread that fails
    std::vector<Shared> retired;

    // The block:
    std::vector<std::unique_ptr<Fiber>>* fibers = nullptr;
    Warp warps[MAX_THREADS / LANES];
    unsigned warp = 0, ready_warps = 0;
    unsigned barriers = 0;  // passed
    std::vector<Shared> shared;

    Context host;
    Context *current = &host, *previous = nullptr;

    Scheduler() {
        const char* text = std::getenv("PARA_EMULATOR_SEED");
        seed = text ? std::strtoull(text, nullptr, 10) : 0;
        if (const char* place = std::getenv("PARA_EMULATOR_LEAVE_OUT")) left_out = place;
    }

    std::string left_out;  // "file.cu:12": a __syncthreads there does nothing, so that tests see who needs it
    bool leaves_out(Place place) const {
        if (left_out.empty()) return false;
        const std::string whole = std::string(place.file) + ":" + std::to_string(place.line);
        return whole.size() > left_out.size() &&
               whole.compare(whole.size() - left_out.size() - 1, std::string::npos, "/" + left_out) == 0;
    }
};

Scheduler the;

unsigned lowest(unsigned lanes) {
    return static_cast<unsigned>(__builtin_ctz(lanes));
}

Fiber& fiber_of(unsigned warp, unsigned lane) {
    return *(*the.fibers)[warp * LANES + lane];
}

Fiber& self() {
    return *static_cast<Fiber*>(the.current);
}

uint32_t random_number() {  // xorshift64*, Vigna 2016
    the.random ^= the.random >> 12;
    the.random ^= the.random << 25;
    the.random ^= the.random >> 27;
    return static_cast<uint32_t>(the.random * 0x2545f4914f6cdd1du >> 32);
}

// What TSan is told: what came before release(tag) happened before what follows acquire(tag).
void release([[maybe_unused]] char* tag) {
#ifdef PARA_EMULATOR_THREAD
    __tsan_release(tag);
#endif
}

void acquire([[maybe_unused]] char* tag) {
#ifdef PARA_EMULATOR_THREAD
    __tsan_acquire(tag);
#endif
}

char launch_begins, launch_ends;

// While it lives, TSan does not see this thread read or write. It would: the C library's functions are its own.
struct Unseen {
#ifdef PARA_EMULATOR_THREAD
    Unseen() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
    ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
    Unseen() {}  // or it would be an unused variable
#endif
};

// Barriers alternate between two tags. With one, a thread that leaves a barrier after others have reached the next one
// would be ordered after them.
char* block_tag() {
    static char tags[POOLS][2];
    return &tags[the.fibers - the.pools][the.barriers % 2];
}

char* warp_tag(unsigned mask) {
    static char tags[POOLS][MAX_THREADS / LANES][LANES][2];
    const unsigned leader = mask ? lowest(mask) : 0;
    const unsigned warp = self().warp;
    return &tags[the.fibers - the.pools][warp][leader][the.warps[warp].barriers[leader] % 2];
}

// Text.

std::string text_of(uint3 x) {
    return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

std::string text_of(Place place) {
    return std::string(place.file) + ":" + std::to_string(place.line);
}

std::string text_of(const Fiber& fiber) {
    char mask[24] = "";
    if (fiber.wait.kind != Wait::block) std::snprintf(mask, sizeof mask, " of lanes %08x", fiber.wait.mask);
    return "thread " + text_of(fiber.thread) + " waits in " + fiber.wait.word + mask + " at " +
           text_of(fiber.wait.place);
}

std::string kernel_and_block() {
    return "kernel " + the.launch.kernel + ", block " + text_of(blockIdx) + ": ";
}

// "void para::cuda::gram<float>(float const*)" becomes "gram<float>".
std::string name_of(const void* kernel) {
    Dl_info info{};
    if (!dladdr(kernel, &info) || info.dli_saddr != kernel) return "(without external linkage)";
    int status = 0;
    char* const demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    const std::string text = demangled ? demangled : info.dli_sname;
    std::free(demangled);
    size_t first = 0, at = 0;
    for (int depth = 0; at < text.size() && (depth > 0 || text[at] != '('); ++at) {
        if (text[at] == '<') ++depth;
        if (text[at] == '>') --depth;
        if (depth == 0 && (text[at] == ' ' || text[at] == ':')) first = at + 1;
    }
    return text.substr(first, at - first);
}

// Shared memory.

unsigned char* allocate_shared(const void* site, size_t bytes) {
    const Unseen unseen;  // the thread that comes first does not write to it
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes + GUARD)) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes + GUARD);
    the.shared.push_back({site, static_cast<unsigned char*>(memory), bytes});
    return the.shared.back().memory;
}

void retire_shared() {
    size_t all = 0;
    for (const Shared& shared : the.shared) {
        all += shared.bytes;
        for (size_t i = shared.bytes; i < shared.bytes + GUARD; ++i) {
            if (shared.memory[i] != 0xff && the.failure.empty()) {
                the.failure = kernel_and_block() + "a write past the " + std::to_string(shared.bytes) + " bytes of a " +
                              (shared.site ? "PARA_SHARED" : "PARA_DYNAMIC_SHARED");
            }
        }
    }
    the.launch.shared = std::max(the.launch.shared, all);
#ifdef PARA_EMULATOR_THREAD
    // Memory that the next block got again would order the two blocks.
    the.retired.insert(the.retired.end(), the.shared.begin(), the.shared.end());
#else
    for (const Shared& shared : the.shared) std::free(shared.memory);
#endif
    the.shared.clear();
}

// Which fiber is next.

// A thread has failed, or all wait in vain: those that have begun unwind, the others never begin.
void cancel(const std::string& text) {
    const Unseen unseen;
    if (the.failure.empty()) the.failure = text;
    the.ready_warps = 0;
    for (unsigned w = 0; w < MAX_THREADS / LANES; ++w) {
        Warp& warp = the.warps[w];
        for (unsigned left = warp.alive; left; left &= left - 1) {
            if (!fiber_of(w, lowest(left)).running) warp.alive &= ~(1u << lowest(left));
        }
        warp.ready = warp.alive;
        warp.turn = warp.waiting = 0;
        if (warp.ready) the.ready_warps |= 1u << w;
    }
}

bool same(const Wait& x, const Wait& y) {
    return x.kind == y.kind && x.mask == y.mask && x.place.line == y.place.line &&
           (x.word == y.word || !std::strcmp(x.word, y.word)) &&
           (x.place.file == y.place.file || !std::strcmp(x.place.file, y.place.file));
}

// Gives each lane of a shuffle its source's value, those of a vote all predicates.
void deliver(unsigned w, unsigned group, bool vote) {
    uint64_t values[LANES], votes = 0;
    for (unsigned left = group; left; left &= left - 1) {
        const unsigned i = lowest(left);
        values[i] = fiber_of(w, i).value;
        if (values[i]) votes |= 1u << i;
    }
    for (unsigned left = group; left; left &= left - 1) {
        Fiber& fiber = fiber_of(w, lowest(left));
        if (vote) {
            fiber.value = votes;
        } else if (fiber.source < LANES && group >> fiber.source & 1) {
            fiber.value = values[fiber.source];
        } else {
            return cancel(kernel_and_block() + text_of(fiber) + " for lane " + std::to_string(fiber.source) +
                          ", which takes no part or has ended");
        }
    }
}

// Lets those lanes of a warp go on whose partners have all come.
void release_lanes(unsigned w) {
    Warp& warp = the.warps[w];
    for (unsigned left = warp.waiting; left;) {
        const Wait& wait = fiber_of(w, lowest(left)).wait;
        const unsigned group = wait.mask & warp.alive;
        bool all = !(group & ~warp.waiting);
        for (unsigned rest = group; all && rest; rest &= rest - 1) all = same(wait, fiber_of(w, lowest(rest)).wait);
        left &= all ? ~group : left - 1;
        if (!all) continue;
        warp.waiting &= ~group;
        warp.ready |= group;
        if (wait.kind == Wait::warp) {
            ++warp.barriers[lowest(wait.mask)];
            ++the.launch.warp_barriers;
        } else {
            deliver(w, group, wait.kind == Wait::vote);
        }
    }
}

// Two threads of which the first waits for the second, which waits elsewhere.
std::string deadlock(const std::vector<Fiber*>& alive) {
    for (const Fiber* x : alive) {
        for (const Fiber* y : alive) {
            const bool partners = x->wait.kind == Wait::block || (x->warp == y->warp && x->wait.mask >> y->lane & 1);
            if (partners && !same(x->wait, y->wait)) return text_of(*x) + ", but " + text_of(*y);
        }
    }
    return "all threads wait";
}

// When no warp can go on: all pass the block's barrier, or it is an error. False when all threads have ended.
bool release_block() {
    static std::vector<Fiber*> alive;  // kept, as this is called often
    alive.clear();
    bool all = true;
    uint64_t any = 0;
    for (unsigned w = 0; w < MAX_THREADS / LANES; ++w) {
        for (unsigned left = the.warps[w].alive; left; left &= left - 1) {
            alive.push_back(&fiber_of(w, lowest(left)));
            all = all && alive.back()->wait.kind == Wait::block && same(alive.back()->wait, alive.front()->wait);
            any |= alive.back()->value;
        }
    }
    if (alive.empty()) return false;
    if (!all) {
        cancel(kernel_and_block() + deadlock(alive));
        return true;
    }
    for (Fiber* fiber : alive) {
        fiber->value = any;
        the.warps[fiber->warp].ready |= 1u << fiber->lane;
        the.ready_warps |= 1u << fiber->warp;
    }
    ++the.barriers;
    ++the.launch.block_barriers;
    return true;
}

// The one that runs next; the host when the block has ended.
Context* pick() {
    const Unseen unseen;
    for (;;) {
        Warp& warp = the.warps[the.warp];
        if (warp.turn) {
            while (!(warp.turn >> (warp.at % LANES) & 1)) warp.at += warp.stride;
            Fiber& fiber = fiber_of(the.warp, warp.at % LANES);
            warp.turn &= ~(1u << fiber.lane);
            threadIdx = fiber.thread;
            lane = fiber.lane;
            return &fiber;
        }
        if (warp.waiting) release_lanes(the.warp);
        if (!warp.ready) the.ready_warps &= ~(1u << the.warp);
        if (!the.ready_warps && !release_block()) return &the.host;
        const uint32_t random = the.seed ? random_number() : the.warp;
        const unsigned by = random % LANES;
        the.warp = (lowest(the.ready_warps >> by | the.ready_warps << (LANES - by) % LANES) + by) % LANES;
        Warp& next = the.warps[the.warp];
        next.turn = next.ready;
        next.ready = 0;
        next.at = the.seed ? random >> 8 : 0;
        next.stride = the.seed ? random >> 16 | 1 : 1;
    }
}

// The switch: on the stack of the one that is left, then on the stack of the one that goes on.

void fiber_main();

[[gnu::noinline]] void jump(Context* from, Context* to) {
    if (PARA_SAVE(from->jump)) return;
    if (to->entered) PARA_JUMP(to->jump, 1);
    to->entered = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = const_cast<void*>(to->stack);
    context.uc_stack.ss_size = to->stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

void arrive() {
#ifdef PARA_EMULATOR_ADDRESS
    __sanitizer_finish_switch_fiber(the.current->sanitizers, &the.previous->stack, &the.previous->stack_bytes);
#endif
}

void switch_to(Context* to) {
    Context* const from = the.current;
    if (to == from) return;
    the.previous = from;
    the.current = to;
#if defined(PARA_EMULATOR_ADDRESS)
    __sanitizer_start_switch_fiber(&from->sanitizers, to->stack, to->stack_bytes);
#elif defined(PARA_EMULATOR_THREAD)
    __tsan_switch_to_fiber(to->sanitizers, __tsan_switch_to_fiber_no_sync);
#endif
    jump(from, to);
    arrive();
}

void run_kernel(Fiber& fiber) {
    std::string problem;
    bool failed = true;
    acquire(&launch_begins);
    fiber.running = true;
    try {
        the.run(the.args);
        failed = false;
    } catch (const Cancelled&) {
        failed = false;
    } catch (const Failure& failure) {
        problem = failure.text;
    } catch (const std::exception& error) {
        problem = kernel_and_block() + error.what();
    }
    fiber.running = false;
    release(&launch_ends);
    the.warps[fiber.warp].alive &= ~(1u << fiber.lane);
    if (failed) cancel(problem);
}

void fiber_main() {
    arrive();
    for (;;) {
        run_kernel(self());
        switch_to(pick());
    }
}

uint64_t wait_for(const Wait& wait, uint64_t value, unsigned source = 0) {
    Fiber& fiber = self();
    fiber.wait = wait;
    fiber.value = value;
    fiber.source = source;
    if (wait.kind != Wait::block) {
        if (!(wait.mask >> fiber.lane & 1)) {
            throw Failure{kernel_and_block() + text_of(fiber) + ", which leave out its own, " +
                          std::to_string(fiber.lane)};
        }
        the.warps[fiber.warp].waiting |= 1u << fiber.lane;
    }
    switch_to(pick());
    if (!the.failure.empty()) throw Cancelled{};
    return fiber.value;
}

Fiber::Fiber(size_t number) : warp(static_cast<unsigned>(number / LANES)), lane(static_cast<unsigned>(number % LANES)) {
    memory = mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, PAGE, PROT_NONE);
    entered = false;
    stack = static_cast<char*>(memory) + PAGE;
    // Stacks that all began at the start of a page would push each other out of the first cache.
    stack_bytes = STACK - number % 16 * 256;
#ifdef PARA_EMULATOR_THREAD
    sanitizers = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#ifdef PARA_EMULATOR_THREAD
    __tsan_destroy_fiber(sanitizers);
#endif
    munmap(memory, PAGE + STACK);
}

void run_block(size_t turn, dim3 block) {
    the.fibers = &the.pools[turn % POOLS];
    const unsigned threads = block.x * block.y * block.z;
    while (the.fibers->size() < threads) the.fibers->push_back(std::make_unique<Fiber>(the.fibers->size()));
    the.ready_warps = 0;
    for (Warp& warp : the.warps) warp = Warp{};
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = *(*the.fibers)[i];
        fiber.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        the.warps[fiber.warp].alive |= 1u << fiber.lane;
        the.warps[fiber.warp].ready |= 1u << fiber.lane;
        the.ready_warps |= 1u << fiber.warp;
    }
    the.warp = 0;
    allocate_shared(nullptr, the.dynamic_bytes);
    switch_to(pick());
    retire_shared();
}

// Why a device would not begin this launch.
std::string refusal(dim3 grid, dim3 block, size_t shared) {
    const auto none = [](dim3 size) { return !size.x || !size.y || !size.z; };
    if (none(grid) || grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX)
        return "a grid that is empty or too large";
    if (none(block) || uint64_t{block.x} * block.y * block.z > MAX_THREADS)
        return "a block must have 1 to 1024 threads";
    if (shared > the.shared_limit) return "more shared memory than a block may have";
    return "";
}

}  // namespace

const std::vector<Launch>& launches() {
    return the.launches;
}

void reset() {
    the.launches.clear();
}

void set_seed(uint64_t seed) {
    the.seed = seed;
}

void set_shared_limit(size_t bytes) {
    the.shared_limit = bytes;
}

unsigned char* dynamic_shared() {
    return the.shared.front().memory;
}

unsigned char* static_shared(const void* site, size_t bytes) {
    size_t all = bytes;
    for (const Shared& shared : the.shared) {
        if (shared.site == site) return shared.memory;
        all += shared.bytes;
    }
    if (all > the.shared_limit) throw Failure{kernel_and_block() + "more shared memory than a block may have"};
    return allocate_shared(site, bytes);
}

void fail(const char* what, Place place) {
    throw Failure{kernel_and_block() + "thread " + text_of(self().thread) + ": " + what + " at " + text_of(place)};
}

bool wait_for_block(bool predicate, const char* word, Place place) {
    if (the.leaves_out(place)) return predicate;
    char* const tag = block_tag();
    release(tag);
    const bool any = wait_for({Wait::block, word, place, 0}, predicate);
    acquire(tag);
    return any;
}

void wait_for_warp(unsigned mask, Place place) {
    char* const tag = warp_tag(mask);
    release(tag);
    wait_for({Wait::warp, "__syncwarp", place, mask}, 0);
    acquire(tag);
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned source_lane, const char* word, Place place) {
    return wait_for({Wait::shuffle, word, place, mask}, bits, source_lane);
}

unsigned vote(unsigned mask, bool predicate, const char* word, Place place) {
    return static_cast<unsigned>(wait_for({Wait::vote, word, place, mask}, predicate));
}

const char* launch(const void* kernel, dim3 grid, dim3 block, size_t shared, void (*run)(void*), void* args) {
    static thread_local std::string text;
    const std::lock_guard<std::mutex> lock(the.busy);
    std::string& name = the.names[kernel];
    if (name.empty()) name = name_of(kernel);
    text = refusal(grid, block, shared);
    if (!text.empty()) {
        text = "kernel " + name + ": " + text;
        return text.c_str();
    }
    the.launch = Launch{};
    the.launch.kernel = name;
    the.launch.grid = gridDim = grid;
    the.launch.block = blockDim = block;
    the.run = run;
    the.args = args;
    the.dynamic_bytes = shared;
    the.failure.clear();
    the.random = (the.seed + 1) * 0x9e3779b97f4a7c15;  // neighbouring seeds far apart
    bytes_read = bytes_written = 0;
#ifdef PARA_EMULATOR_THREAD
    the.host.sanitizers = __tsan_get_current_fiber();
#endif

    std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    for (size_t i = order.size(); the.seed && i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
    release(&launch_begins);
    for (size_t turn = 0; turn < order.size() && the.failure.empty(); ++turn) {
        const uint64_t i = order[turn];
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        run_block(turn, block);
    }
    acquire(&launch_ends);
    for (const Shared& memory : the.retired) std::free(memory.memory);
    the.retired.clear();
    the.launch.read = bytes_read;
    the.launch.written = bytes_written;
    the.launches.push_back(the.launch);
    text = the.failure;
    return text.empty() ? nullptr : text.c_str();
}

}  // namespace para::emulator

size_t para::cuda::shared_limit(int) {
    return emulator::the.shared_limit;
}
