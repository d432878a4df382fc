/* rlhf.c - the whole of RLHF on an ordinary CPU: supervised fine-tuning, reward model, PPO.
 *
 * This file owns everything from the matrix product to the command line. It does not download,
 * does not use a GPU, keeps no padding and no logits, and has one code path for sampling and for
 * training, so that the log-probability recorded while sampling is the one that training
 * computes, to the last bit.
 *
 * Read it upward or downward: a section calls only sections above it, there is not one forward
 * declaration. `MARK:` lines are indexed by grep, minimaps and jump bars.
 *
 *   01 CONFIG (RLHF_)          compiler, platform, limits, third-party headers
 *   02 BASE (err_ log_ base_)  context, errors that unwind to the public call, log, time
 *   03 MEM (mem_ arena_)       blocks that a failed call gives back, arenas for steps
 *   04 RNG (rng_)              counter-based random numbers
 *   05 PAR (par_)              threads: fixed splits over outputs
 *   06 VEC (v_ vi_ v16_)       sixteen virtual lanes: AVX2, NEON, plain C; exp, tanh, sin and such
 *   07 KERN (k_)               row kernels on 06, each with a plain-C twin
 *   08 GEMM (gemm_)            the matrix product: packing, tiles, driver
 *   09 LINEAR (op_)            norms, matrices as files store them, adapters, the linear layer
 *   10 OPS (op_)               embedding, activations, attention, the vocabulary
 *   11 IO (io_)                files: bounded reads, mapping, atomic writes, gzip
 *   12 JSON (json_)            schema helpers whose errors say file, line, key
 *   13 TOK (tok_)              byte-level and SentencePiece-style BPE: encoding, decoding
 *   14 VOCAB (tok_)            tokenizer.json in and out, training a vocabulary
 *   15 CHAT (chat_)            conversations as text: templates as data, spans that bear loss
 *   16 FAMILY (model_)         architectures as data: config.json, names of tensors, parameters
 *   17 MODEL (model_)          weights: their own or a base's, adapters, layout, initial values
 *   18 PASS (model_)           forward, backward, heads, batches
 *   19 CKPT (ckpt_)            safetensors and Hugging Face directories
 *   20 ADAPT (ckpt_)           adapters in the layout of PEFT; opening and writing directories
 *   21 GGUF (gguf_)            the model and its tokenizer as a file for llama.cpp
 *   22 OPT (opt_)              AdamW, clipping, schedules
 *   23 DATA (data_)            records, loss spans, orders
 *   24 GEN (gen_)              sampling and batched generation
 *   25 ROLL (roll_)            rollouts: KL, rewards, whitening, advantages
 *   26 TRAIN (train_)          what trainers share: configurations, metrics, memory
 *   27 RUN (train_)            the run directory, TensorBoard, resume, the loop
 *   28 SFT (sft_)              supervised fine-tuning
 *   29 RM (rm_)                the reward model
 *   30 PPO (ppo_)              proximal policy optimisation
 *   31 EVAL (eval_)            perplexity, KL, preference accuracy by slice
 *   32 RATER (rater_)          annotators: agreement, reliability, labels from many hands
 *   33 API (rlhf_ api_)        every public function: checks arguments, calls one layer down
 *   34 BENCH (bench_)          the machine's speed at this work; only under RLHF_MAIN
 *   35 PAGE (page_)            the files of data/page/; only under RLHF_MAIN
 *   36 REPORT (report_)        runs as one page for a browser; only under RLHF_MAIN
 *   37 LABEL (label_)          judgements of people: who is asked what, the file that keeps them
 *   38 POOL (label_)           what there is to judge, and who judges; only under RLHF_MAIN, as 37
 *   39 SERVE (serve_)          the page for browsers, the terminal; only under RLHF_MAIN
 *   40 CLI (cli_)              options, --help, --config, progress; only under RLHF_MAIN
 *   41 TALK (talk_)            a conversation in the terminal; only under RLHF_MAIN
 *   42 STAGE (cli_)            the commands that train; only under RLHF_MAIN
 *   43 COMMAND (cli_ main)     the program's other commands, main; only under RLHF_MAIN
 *
 * Numerics. (1) Work is split over outputs, never over a sum. (2) Every output of a matrix product
 * is one chain of fused multiply-adds over k in order; every row reduction has sixteen lanes and
 * one tree. Hence the same bits for any thread count, batch composition, tile shape and
 * instruction set. (3) exp, log, tanh, erf, sin and cos are polynomials of 06, never libm's.
 *
 * Embedding: compile with -ffp-contract=off; -fopenmp is optional. No -march flag is needed:
 * kernels carry their own target attributes and are chosen when a context is opened. RLHF_MAIN
 * adds the program, which includes page.h: `make` writes it from data/page/.
 */

/* ============================================================================================
 * MARK: - 01 CONFIG (RLHF_)
 * Compiler and platform: the only place with feature tests. Everything below is plain C11 with
 * the attributes defined here.
 * Order matters: feature macros come before the first system header, the renaming of stb_ds before
 * its header (03). Nothing here depends on -march or on optimisation flags.
 * ============================================================================================ */

/* fsync, fileno, strdup and clock_gettime under a strict -std: each macro wakes one libc. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#ifndef _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#endif

#include "rlhf.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>
#include <zlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* The baseline of either architecture is all that the compiler may assume; functions that use more
 * carry RLHF_TARGET. On aarch64 NEON is the baseline, so that there it is empty. */
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif
#define RLHF_X86 1
#define RLHF_TARGET __attribute__((target("avx2,fma,f16c")))
#define RLHF_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#include <arm_neon.h>
#define RLHF_NEON 1
#define RLHF_TARGET
#define RLHF_PAUSE() __asm__ volatile("isb")
#else
#define RLHF_TARGET
#define RLHF_PAUSE() sched_yield()
#endif

/* Bodies that must be inlined into a function with the same target, so that their constants fold.
 */
#define RLHF_INLINE static inline __attribute__((always_inline, unused))
#define RLHF_PRINTF(a, b) __attribute__((format(printf, a, b)))

/* One thread uses one context at a time; this is how stb_ds, which has no user pointer, finds it.
 */
#define RLHF_THREAD _Thread_local

/* Changing RLHF_LANES changes the bits of every result: it is the shape of every reduction. */
enum {
    RLHF_LANES = 16, /* virtual lanes of every row reduction; also the width of a packed panel */
    RLHF_ALIGN = 64, /* of arena blocks: one cache line */
    RLHF_MAX_THREADS = 1024, /* bound on options, not on any table */
    RLHF_ERROR_TEXT = 1024,  /* bytes of the last error's text */
    RLHF_MAX_DEFER = 64      /* resources held at once by one public call */
};

/* File formats and bit patterns are written with these sizes in mind. */
_Static_assert(sizeof(float) == 4 && sizeof(double) == 8, "IEEE single and double precision");
_Static_assert(sizeof(size_t) == 8, "64-bit address space");

/* stb_ds exports plain names: a host that uses it too must not clash with ours. */
#define stbds_arrfreef rlhf_stbds_arrfreef
#define stbds_arrgrowf rlhf_stbds_arrgrowf
#define stbds_hash_bytes rlhf_stbds_hash_bytes
#define stbds_hash_string rlhf_stbds_hash_string
#define stbds_hmdel_key rlhf_stbds_hmdel_key
#define stbds_hmfree_func rlhf_stbds_hmfree_func
#define stbds_hmget_key rlhf_stbds_hmget_key
#define stbds_hmget_key_ts rlhf_stbds_hmget_key_ts
#define stbds_hmput_default rlhf_stbds_hmput_default
#define stbds_hmput_key rlhf_stbds_hmput_key
#define stbds_rand_seed rlhf_stbds_rand_seed
#define stbds_shmode_func rlhf_stbds_shmode_func
#define stbds_stralloc rlhf_stbds_stralloc
#define stbds_strreset rlhf_stbds_strreset

/* ============================================================================================
 * MARK: - 02 BASE (err_ log_ base_)
 * The context and the one way to fail: err_throw writes the text into the context and unwinds to
 * the public call, which gives back every block allocated since it began (03) and runs what was
 * deferred (open files, parsed JSON), newest first. So code below checks nothing on the way up, and
 * running out of memory is handled everywhere.
 * Entry: err_throw, err_defer, log_at.
 * Invariant: err_throw is never reached inside a parallel region (05): no jump may leave one.
 * ============================================================================================ */

/* Defined in 03; the context holds the list of them. */
typedef struct mem_block mem_block;

/* One public call, or a call back from a library that cannot be jumped across. Frames nest: a
 * reward function may call the library again with the same context. */
typedef struct err_frame {
    jmp_buf jump;
    struct err_frame *up;
    uint64_t seq;    /* blocks with this number or a later one were allocated inside the frame */
    int defers;      /* depth of the defer stack at entry */
    rlhf_ctx *outer; /* the context that was current on this thread */
} err_frame;

/* A resource and what gives it back, as in "close this file". run must not throw. */
typedef struct err_deferred {
    void (*run)(void *);
    void *ptr;
} err_deferred;

/* Kernels of one instruction set (07), weights that models share (17). */
struct k_table;
struct model_base;

/* Used by one thread at a time. Everything that the library remembers between calls hangs here or
 * on an object that points here; there is no other state but base_current. */
struct rlhf_ctx {
    rlhf_hooks hooks;
    int threads;             /* at most so many pieces of work at once */
    const struct k_table *k; /* the kernels chosen for this context */
    struct par_team *team;   /* its threads */
    int half;                /* products of models are of bfloat16 */
    size_t cache;            /* bytes of a core's second-level cache: steers time only */
    struct model_base *bases; /* weights that open models share (17) */
    err_frame *frame;        /* innermost running call; null between calls */
    err_deferred defer[RLHF_MAX_DEFER];
    int n_defer;                 /* entries of defer in use */
    rlhf_status status;          /* of the last failure */
    mem_block *blocks;           /* newest first */
    uint64_t seq;                /* number of the next block */
    int64_t n_allocs;            /* calls of the allocation hook so far */
    int64_t mem_now, mem_peak;   /* bytes held through the allocation hook */
    char error[RLHF_ERROR_TEXT]; /* text of the last failure, or "" */
};

/* The context whose call runs on this thread, for callbacks without a user pointer. */
static RLHF_THREAD rlhf_ctx *base_current;

/* Seconds on a clock that never goes back; only differences mean anything. Never an input of a
 * result: times appear in logs and benches alone. */
static double base_now(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* Records an error without unwinding; for the edges where there is no frame. */
static void err_note(rlhf_ctx *ctx, rlhf_status status, const char *text) {
    ctx->status = status;
    snprintf(ctx->error, sizeof ctx->error, "%s", text);
}

/* Fails the current public call: status and text go into the context, control to its frame. The
 * text is complete before anything else happens, since its arguments may point into what is given
 * back. */
__attribute__((noreturn)) RLHF_PRINTF(3, 4) static void err_throw(rlhf_ctx *ctx, rlhf_status status,
                                                                  const char *format, ...) {
    char text[RLHF_ERROR_TEXT];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    err_note(ctx, status, text);
    longjmp(ctx->frame->jump, 1);
}

/* Has run(ptr) called if the current call fails before err_release. Strictly a stack: resources are
 * released or kept in the reverse of the order in which they were deferred. */
static void err_defer(rlhf_ctx *ctx, void (*run)(void *), void *ptr) {
    if (ctx->n_defer == RLHF_MAX_DEFER) {
        run(ptr);
        err_throw(ctx, RLHF_ERR_ARG, "more than %d resources held at once", (int)RLHF_MAX_DEFER);
    }
    ctx->defer[ctx->n_defer++] = (err_deferred){run, ptr};
}

/* Releases the newest deferred resource now. */
static void err_release(rlhf_ctx *ctx) {
    err_deferred d = ctx->defer[--ctx->n_defer];
    d.run(d.ptr);
}

/* Forgets the newest deferred resource: somebody else owns it from here on. */
static void err_keep(rlhf_ctx *ctx) { ctx->n_defer--; }

/* Sends one message, without a newline, to the host's log hook; longer ones are cut. */
RLHF_PRINTF(3, 4)
static void log_at(rlhf_ctx *ctx, rlhf_level level, const char *format, ...) {
    if (!ctx->hooks.log) return;
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ctx->hooks.log(ctx->hooks.user, level, text);
}

/* a * b as a size, or an error. */
static size_t base_mul(rlhf_ctx *ctx, size_t a, size_t b) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r))
        err_throw(ctx, RLHF_ERR_MEMORY, "a size overflows: %zu x %zu", a, b);
    return r;
}

/* The next multiple of unit; the caller knows that n + unit does not overflow. */
static size_t base_round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

/* Of ints, which count rows, tokens and panels here; sizes in bytes are size_t. */
RLHF_INLINE int base_min(int a, int b) { return a < b ? a : b; }
RLHF_INLINE int base_max(int a, int b) { return a > b ? a : b; }

/* 1 if value is one of the words that '|' separates in choices. */
static int base_is_choice(const char *choices, const char *value) {
    size_t n = strlen(value);
    if (strchr(value, '|')) return 0;
    for (const char *p = choices; n && (p = strstr(p, value)); p++)
        if ((p == choices || p[-1] == '|') && (p[n] == 0 || p[n] == '|')) return 1;
    return 0;
}

/* ============================================================================================
 * MARK: - 03 MEM (mem_ arena_)
 * All memory of the library comes through the context's hooks in blocks that know their context and
 * their age. A public call that fails gives back the blocks younger than itself; therefore an
 * object that existed before a call may grow during it only through an arena, or by blocks that
 * mem_settle has made as old. Arenas serve the steps of training: after the first step they are one
 * block and nothing is allocated any more.
 *
 * What lives how long:
 *     a block           until mem_free, or until the call that made it fails
 *     a temporary block until the call that made it ends (mem_temp)
 *     arena memory      until arena_restore, arena_reset or arena_free, whatever calls do
 *     a deferred thing  until err_release, or until the call fails; after err_keep its owner's
 *
 * Entry: mem_alloc, mem_free, mem_temp; arena_alloc, arena_save, arena_restore, arena_reset.
 * Invariant: the list of blocks is ordered by age, newest first; settled blocks (seq 0) close it.
 * Tests: test/test_api.c (every n-th allocation fails)
 * ============================================================================================ */

/* Stands in front of every block; what callers hold is the address behind it. */
struct mem_block {
    mem_block *older, *younger; /* list of the context's blocks */
    rlhf_ctx *ctx;
    uint64_t seq;     /* age; 0: of an arena, outlives failed calls */
    size_t size;      /* as asked for, without this header */
    size_t temporary; /* 1: given back when the public call that made it ends */
};

_Static_assert(sizeof(mem_block) % 16 == 0, "blocks stay aligned for any type");

/* Makes b the newest block of the context. */
static void mem_link(rlhf_ctx *ctx, mem_block *b, uint64_t seq) {
    b->ctx = ctx;
    b->seq = seq;
    b->younger = NULL;
    b->older = ctx->blocks;
    if (b->older) b->older->younger = b;
    ctx->blocks = b;
}

/* Takes b out of its context's list, wherever it stands. */
static void mem_unlink(mem_block *b) {
    if (b->younger) b->younger->older = b->older;
    else b->ctx->blocks = b->older;
    if (b->older) b->older->younger = b->younger;
}

/* size bytes, uninitialised; throws when there are none. */
static void *mem_alloc(rlhf_ctx *ctx, size_t size) {
    size_t whole = size + sizeof(mem_block);
    mem_block *b = whole < size ? NULL : ctx->hooks.alloc(ctx->hooks.user, whole);
    ctx->n_allocs++;
    if (!b) err_throw(ctx, RLHF_ERR_MEMORY, "out of memory: %zu bytes", size);
    b->size = size;
    b->temporary = 0;
    mem_link(ctx, b, ctx->seq++);
    ctx->mem_now += (int64_t)whole;
    if (ctx->mem_now > ctx->mem_peak) ctx->mem_peak = ctx->mem_now;
    return b + 1;
}

/* count zeroed elements of size bytes each; throws when there are none or the product overflows. */
static void *mem_zalloc(rlhf_ctx *ctx, size_t count, size_t size) {
    size_t n = base_mul(ctx, count, size);
    return memset(mem_alloc(ctx, n), 0, n);
}

/* Gives a block back to the hook it came from. null is allowed; the context is the block's own. */
static void mem_free(void *ptr) {
    if (!ptr) return;
    mem_block *b = (mem_block *)ptr - 1;
    rlhf_ctx *ctx = b->ctx;
    mem_unlink(b);
    ctx->mem_now -= (int64_t)(b->size + sizeof *b);
    ctx->hooks.free(ctx->hooks.user, b, b->size + sizeof *b);
}

/* Marks a block as living no longer than the public call that is running. */
static void *mem_temp(void *ptr) {
    ((mem_block *)ptr - 1)->temporary = 1;
    return ptr;
}

/* Makes a block as old as an arena's: a failed call does not take it back. For what an object that
 * is older than the call is to own. */
static void *mem_settle(void *ptr) {
    mem_block *b = (mem_block *)ptr - 1, *last;
    mem_unlink(b);
    b->seq = 0;
    for (last = b->ctx->blocks; last && last->older;) last = last->older;
    b->younger = last;
    b->older = NULL;
    if (last) last->older = b;
    else b->ctx->blocks = b;
    return ptr;
}

/* A block of size bytes with the contents of ptr (null: none), which is given back. The result is
 * as young as the running call: only for objects that the call itself made. */
static void *mem_realloc(rlhf_ctx *ctx, void *ptr, size_t size) {
    void *p = mem_alloc(ctx, size);
    if (ptr) {
        size_t old = ((mem_block *)ptr - 1)->size;
        memcpy(p, ptr, old < size ? old : size);
        mem_free(ptr);
    }
    return p;
}

/* The first n bytes of s and a NUL, as a block. */
static char *mem_strndup(rlhf_ctx *ctx, const char *s, size_t n) {
    char *p = mem_alloc(ctx, n + 1);
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

/* The same for a whole string. */
static char *mem_strdup(rlhf_ctx *ctx, const char *s) { return mem_strndup(ctx, s, strlen(s)); }

/* The formatted text as a block of its exact length. */
RLHF_PRINTF(2, 3)
static char *mem_printf(rlhf_ctx *ctx, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char *p = mem_alloc(ctx, (size_t)(n < 0 ? 0 : n) + 1);
    va_start(args, format);
    vsnprintf(p, (size_t)(n < 0 ? 0 : n) + 1, format, args);
    va_end(args);
    return p;
}

/* What stb_ds calls. It never sees null: running out of memory unwinds instead, and the tables it
 * was growing are younger than the call and go with it. */
static void *mem_stb_realloc(void *ptr, size_t size) {
    return mem_realloc(base_current, ptr, size);
}

/* The implementation of stb_ds is compiled here, once, with warnings that are not ours to fix
 * off. */
#define STBDS_NO_SHORT_NAMES
#define STBDS_REALLOC(context, ptr, size) mem_stb_realloc(ptr, size)
#define STBDS_FREE(context, ptr) mem_free(ptr)
#define STB_DS_IMPLEMENTATION
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-value"
#endif
#include <stb/stb_ds.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

/* ---- frames of public calls ---- */

/* Enters a public call; every path out goes through mem_leave. The outermost call clears the last
 * error, so that rlhf_error speaks of the newest call. */
static void mem_enter(rlhf_ctx *ctx, err_frame *frame) {
    frame->up = ctx->frame;
    frame->seq = ctx->seq;
    frame->defers = ctx->n_defer;
    frame->outer = base_current;
    ctx->frame = frame;
    base_current = ctx;
    if (!frame->up) {
        ctx->status = RLHF_OK;
        ctx->error[0] = 0;
    }
}

/* Leaves it; returns its status. After a failure everything the call had taken is given back:
 * resources first, newest first, since they may live in blocks; then blocks. Either way temporary
 * blocks go. */
static rlhf_status mem_leave(rlhf_ctx *ctx, int failed) {
    err_frame *frame = ctx->frame;
    if (failed) {
        while (ctx->n_defer > frame->defers) err_release(ctx);
        while (ctx->blocks && ctx->blocks->seq >= frame->seq) mem_free(ctx->blocks + 1);
    }
    for (mem_block *b = ctx->blocks, *older; b && b->seq >= frame->seq; b = older) {
        older = b->older;
        if (b->temporary) mem_free(b + 1);
    }
    if (!failed && !frame->up) ctx->error[0] = 0; /* something that could be done without */
    ctx->frame = frame->up;
    base_current = frame->outer;
    return failed ? ctx->status : RLHF_OK;
}

/* ---- arenas ---- */

/* One piece of an arena: this header, then size bytes from a cache line on. */
typedef struct arena_block {
    struct arena_block *next;
    size_t size, used;
} arena_block;

/* A stack of memory. Blocks belong to the arena and survive a failed call; arena_reset joins them
 * into one. */
typedef struct arena {
    rlhf_ctx *ctx;
    arena_block *top;   /* newest first */
    size_t peak, total; /* bytes handed out: most since the last arena_free, and now */
    size_t high;        /* most since somebody set it to total */
} arena;

/* A height of the stack, to go back to. */
typedef struct arena_mark {
    arena_block *block;
    size_t used;
} arena_mark;

/* A block of size usable bytes that no failed call takes back. */
static arena_block *arena_block_new(arena *a, size_t size) {
    arena_block *b = mem_settle(mem_alloc(a->ctx, sizeof *b + RLHF_ALIGN + size));
    b->size = size;
    b->used = 0;
    return b;
}

/* First usable byte of a block; RLHF_ALIGN spare bytes make room for the rounding. */
static char *arena_base(arena_block *b) {
    return (char *)base_round_up((size_t)(b + 1), RLHF_ALIGN);
}

/* Makes room for size bytes in one block: one of at least `least` bytes follows a full one. */
static void arena_reserve(arena *a, size_t size, size_t least) {
    if (a->top && a->top->used + size <= a->top->size) return;
    arena_block *b = arena_block_new(a, size > least ? size : least);
    b->next = a->top;
    a->top = b;
}

/* size bytes aligned to a cache line; contents undefined. Throws when there are none. Memory stays
 * where it is until it is restored. */
static void *arena_take(arena *a, size_t size, size_t least) {
    size = base_round_up(size ? size : 1, RLHF_ALIGN);
    arena_reserve(a, size, least);
    void *p = arena_base(a->top) + a->top->used;
    a->top->used += size;
    a->total += size;
    if (a->total > a->peak) a->peak = a->total;
    if (a->total > a->high) a->high = a->total;
    return p;
}

/* The same, where what follows will be small and many. */
static void *arena_alloc(arena *a, size_t size) { return arena_take(a, size, (size_t)1 << 20); }

/* An uninitialised matrix [rows][cols]; 0 x 0 is a valid pointer. */
static float *arena_floats(arena *a, size_t rows, size_t cols) {
    return arena_alloc(a, base_mul(a->ctx, base_mul(a->ctx, rows, cols), sizeof(float)));
}

/* The same, filled with zeros. */
static float *arena_zeros(arena *a, size_t rows, size_t cols) {
    return memset(arena_floats(a, rows, cols), 0, rows * cols * sizeof(float));
}

/* The current height; everything taken from here on goes with arena_restore(a, mark). */
static arena_mark arena_save(arena *a) { return (arena_mark){a->top, a->top ? a->top->used : 0}; }

/* Gives back what was taken since the mark. */
static void arena_restore(arena *a, arena_mark mark) {
    while (a->top && a->top != mark.block) {
        arena_block *b = a->top;
        a->top = b->next;
        a->total -= b->used;
        /* The largest block may be the next step's only one: arena_reset decides. */
        mem_free(b);
    }
    if (a->top) {
        a->total -= a->top->used - mark.used;
        a->top->used = mark.used;
    }
}

/* Empties the arena and makes it one block of the largest size seen, so that the next step
 * allocates nothing. */
static void arena_reset(arena *a) {
    if (a->top && !a->top->next && a->top->size >= a->peak) {
        a->top->used = 0;
        a->total = 0;
        return;
    }
    arena_restore(a, (arena_mark){NULL, 0});
    if (a->peak) a->top = arena_block_new(a, a->peak);
    if (a->top) a->top->next = NULL;
}

/* Gives all memory back. The arena is empty and may be used again. */
static void arena_free(arena *a) {
    arena_restore(a, (arena_mark){NULL, 0});
    a->peak = 0;
}

/* ============================================================================================
 * MARK: - 04 RNG (rng_)
 * Counter-based: a number is a function of (seed, stream, index) and nothing else, so that a sample
 * does not depend on threads, on the batch around it, or on where a run was resumed. The design is
 * that of Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3", with a cheaper
 * mixing function: nothing here needs the strength of a block cipher. There is no state to save in
 * a checkpoint and none to hand to threads.
 * ============================================================================================ */

/* Streams: one for each use, so that no two uses ever share a number. */
enum {
    RNG_INIT = 1,   /* initial weights; index = position in the flat parameter array */
    RNG_HEAD,       /* initial score head */
    RNG_ORDER,      /* order of records; index mixes epoch and position */
    RNG_MINIBATCH,  /* order of episodes inside a PPO update */
    RNG_PROMPT,     /* order of prompts */
    RNG_BOOTSTRAP,  /* resampled items */
    RNG_LORA,       /* initial adapters; index = position in the flat parameter array */
    RNG_DROPOUT,    /* what adapters do not see; the seed mixes step and layer */
    RNG_LABEL,      /* what annotators are shown, and in which order */
    RNG_SAMPLE = 64 /* sampling: RNG_SAMPLE + a key of the sample; index = position in the answer */
};

/* For the high half of a 64 x 64 bit product. */
__extension__ typedef unsigned __int128 rng_u128;

/* SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection in which each bit of the input
 * flips about half of the output's. */
static uint64_t rng_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* 64 random bits. Three rounds of the finaliser, one for each part of the key; odd constants keep
 * small seeds, streams and indices, the usual ones, from looking alike to it. */
static uint64_t rng_u64(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t x = rng_mix(seed + 0x9e3779b97f4a7c15u);
    x = rng_mix(x ^ (stream * 0xd1342543de82ef95u + 0x632be59bd9b4e019u));
    return rng_mix(x ^ (index * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du));
}

/* Uniform in [0, 1), a multiple of 2^-53: the 53 high bits, exact in a double. */
static double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return (double)(rng_u64(seed, stream, index) >> 11) * 0x1p-53;
}

/* A random order of 0..n-1 (Fisher-Yates) into order[n]; round distinguishes epochs. The index of a
 * swap is the high half of r (i + 1): its bias is below n / 2^64 and it costs no division. */
static void rng_permutation(uint64_t seed, uint64_t stream, uint64_t round, int n, int *order) {
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        uint64_t r = rng_u64(seed, stream, (round << 32) + (uint64_t)i);
        /* 0 <= j <= i */
        int j = (int)(((rng_u128)r * (unsigned)(i + 1)) >> 64);
        int t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

/* ============================================================================================
 * MARK: - 05 PAR (par_)
 * The only place that knows about threads. Work is a range of outputs, cut into pieces by its size
 * and the number of threads; no sum is ever cut, so the result does not depend on the cut, nor on
 * who does which piece. The number of threads is the context's; nothing is set for the process,
 * which belongs to the host.
 *
 * A context has one team: one OpenMP region, opened by a thread of its own at the first work worth
 * sharing, that lives until the context is closed. A region for each piece of work would end in a
 * barrier, which waits even for a thread that the system did not run and that has nothing to do;
 * on a machine with other programs that is most of the time. Here a thread takes pieces of its own
 * share first, so that its cache keeps what it knows, then of the others'; whoever comes late finds
 * the work done, and only a piece in hand is waited for. On the way of a job lie few cache lines
 * that two cores write: with many threads these are what small work costs. Threads without work
 * look for it for PAR_PATIENCE, then sleep. The host's callbacks run outside of the region.
 *
 * Entry: par_for.
 * Invariant: fn writes outputs [lo, hi) and its thread's scratch, nothing else, and never throws.
 * ============================================================================================ */

/* Computes outputs [lo, hi). thread < the context's thread count selects scratch. */
typedef void (*par_fn)(void *arg, int64_t lo, int64_t hi, int thread);

enum { PAR_PIECES = 4 }; /* pieces of one thread's share: what a late thread leaves to others */
enum { PAR_GRACE = 16 }; /* looks at a job before a thread helps others with it */
#define PAR_PATIENCE 100e-6

/* One piece of work for all: fn(arg, ...) on [0, n). */
typedef struct par_job {
    par_fn fn;
    void *arg;
    int64_t n;          /* outputs */
    int64_t units;      /* pieces are whole units of `grain` outputs */
    int64_t grain;
    int shares, pieces; /* parts, one for each thread that the range is worth; pieces of each */
} par_job;

/* What belongs to one thread, each on a line of its own: a line that two cores write is what a job
 * of microseconds would wait for. */
typedef struct par_lane {
    _Alignas(RLHF_ALIGN) _Atomic uint64_t open; /* its share: job << 8 | pieces nobody has taken */
    _Alignas(RLHF_ALIGN) _Atomic uint64_t done; /* pieces that it has done, of all jobs */
} par_lane;

/* A context's threads and the job at hand. Only the context's own thread posts jobs; it does so
 * between two steps of `turn`, whose odd values say that the members of `job` are being written.
 * Nothing else is written to post a job: a share that says an older number is whole. */
typedef struct par_team {
    void *block;    /* what the hook gave for this, and its size */
    size_t size;
    int threads;    /* the context's own thread among them */
    int opened;     /* 1: the region runs; -1: the system gave no thread */
    uint64_t asked; /* pieces of all jobs so far */
    pthread_t opener;
    pthread_mutex_t lock; /* of the sleep, and nothing else */
    pthread_cond_t wake;
    _Atomic int asleep, leave;
    _Alignas(RLHF_ALIGN) _Atomic uint64_t turn; /* even: number of the newest job */
    _Atomic par_fn fn;                          /* its members, on the same line */
    _Atomic(void *) arg;
    _Atomic int64_t n, units, grain;
    _Atomic int shares, pieces;
    par_lane lane[];
} par_team;

/* Processors that this process may use, 1 without OpenMP. */
static int par_default_threads(void) {
#ifdef _OPENMP
    return omp_get_num_procs();
#else
    return 1;
#endif
}

/* Bytes of the second-level cache of one core; 1 MiB where the system does not tell. */
static size_t par_cache_size(void) {
    long size = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size >= 1 << 17 ? (size_t)size : (size_t)1 << 20;
}

/* Units of work that make a piece worth a thread, when one unit costs about `cost` simple
 * operations. The value steers time only, never results. */
static int64_t par_grain(int64_t cost) { return 1 + 4096 / (cost > 0 ? cost : 1); }

#ifdef _OPENMP
/* Posts a job and returns its number. The fence keeps the members behind the odd value, that in
 * par_read keeps the number behind the members: who reads one of a later job sees that it is. */
static uint64_t par_post(par_team *t, const par_job *j) {
    uint64_t turn = atomic_load_explicit(&t->turn, memory_order_relaxed);
    atomic_store_explicit(&t->turn, turn + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    atomic_store_explicit(&t->fn, j->fn, memory_order_relaxed);
    atomic_store_explicit(&t->arg, j->arg, memory_order_relaxed);
    atomic_store_explicit(&t->n, j->n, memory_order_relaxed);
    atomic_store_explicit(&t->units, j->units, memory_order_relaxed);
    atomic_store_explicit(&t->grain, j->grain, memory_order_relaxed);
    atomic_store_explicit(&t->shares, j->shares, memory_order_relaxed);
    atomic_store_explicit(&t->pieces, j->pieces, memory_order_relaxed);
    /* In one order with `asleep`: see par_for. */
    atomic_store(&t->turn, turn + 2);
    return turn + 2;
}

/* Copies the job of that number; returns 0 when it is over and the next one is on its way. */
static int par_read(par_team *t, uint64_t number, par_job *j) {
    j->fn = atomic_load_explicit(&t->fn, memory_order_relaxed);
    j->arg = atomic_load_explicit(&t->arg, memory_order_relaxed);
    j->n = atomic_load_explicit(&t->n, memory_order_relaxed);
    j->units = atomic_load_explicit(&t->units, memory_order_relaxed);
    j->grain = atomic_load_explicit(&t->grain, memory_order_relaxed);
    j->shares = atomic_load_explicit(&t->shares, memory_order_relaxed);
    j->pieces = atomic_load_explicit(&t->pieces, memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&t->turn, memory_order_relaxed) == number;
}

/* Takes the next piece of a share, or returns -1 when there is none: also of a job that is over,
 * all of whose shares say its number or a later one. */
static int par_take(par_lane *lane, uint64_t number, int pieces) {
    uint64_t open = atomic_load_explicit(&lane->open, memory_order_relaxed), left;
    do {
        uint64_t job = open >> 8;
        left = job < number ? (uint64_t)pieces : job > number ? 0 : open & 255;
        if (!left) return -1;
    } while (!atomic_compare_exchange_weak_explicit(&lane->open, &open,
                                                    number << 8 | (left - 1),
                                                    memory_order_relaxed, memory_order_relaxed));
    return pieces - (int)left;
}

/* Does what is left of one share of a job. */
static void par_share(par_team *t, const par_job *j, uint64_t number, int share, int self) {
    int took = 0;
    for (int p; (p = par_take(t->lane + share, number, j->pieces)) >= 0; took++) {
        int64_t first = j->units * share / j->shares;
        int64_t size = j->units * (share + 1) / j->shares - first;
        int64_t lo = (first + size * p / j->pieces) * j->grain;
        int64_t hi = (first + size * (p + 1) / j->pieces) * j->grain;
        if (lo < hi) j->fn(j->arg, lo, hi < j->n ? hi : j->n, self);
    }
    _Atomic uint64_t *done = &t->lane[self].done;
    if (!took) return;
    atomic_store_explicit(done, atomic_load_explicit(done, memory_order_relaxed) + (uint64_t)took,
                          memory_order_release);
}

/* Whether all pieces of all jobs are done. */
static int par_done(par_team *t) {
    uint64_t done = 0;
    for (int i = 0; i < t->threads; i++)
        done += atomic_load_explicit(&t->lane[i].done, memory_order_acquire);
    return done == t->asked;
}

/* Whether a job is over: who posted it, `self` 0, counts what is done; others see that the next one
 * is on its way. */
static int par_over(par_team *t, uint64_t number, int self) {
    return self ? atomic_load_explicit(&t->turn, memory_order_relaxed) != number : par_done(t);
}

/* Does pieces of a job until none is left to take: of the own share, then of the others'. Between
 * the two it waits as long as others may be late in any job: a look at their shares takes these
 * lines from them. */
static void par_work(par_team *t, const par_job *j, uint64_t number, int self) {
    if (self < j->shares) par_share(t, j, number, self, self);
    for (int i = 0; i < PAR_GRACE; i++) {
        if (par_over(t, number, self)) return;
        RLHF_PAUSE();
    }
    for (int i = 1; i <= j->shares && !par_over(t, number, self); i++)
        par_share(t, j, number, (self + i) % j->shares, self);
}

/* Waits for a job newer than `seen`: awake for a while, then asleep. Returns its number, or `seen`
 * when it is time to leave. */
static uint64_t par_wait(par_team *t, uint64_t seen) {
    double begun = 0;
    for (int i = 0; !atomic_load_explicit(&t->leave, memory_order_relaxed); i++) {
        uint64_t turn = atomic_load_explicit(&t->turn, memory_order_acquire);
        if (turn != seen && turn % 2 == 0) return turn;
        RLHF_PAUSE();
        if (i % 64) continue;
        if (!i) begun = base_now();
        if (base_now() - begun < PAR_PATIENCE) continue;
        pthread_mutex_lock(&t->lock);
        atomic_fetch_add(&t->asleep, 1);
        while (atomic_load(&t->turn) == seen && !atomic_load(&t->leave))
            pthread_cond_wait(&t->wake, &t->lock);
        atomic_fetch_sub(&t->asleep, 1);
        pthread_mutex_unlock(&t->lock);
        i = -1;
    }
    return seen;
}

/* The life of thread `self` of the team. */
static void par_member(par_team *t, int self) {
    par_job j;
    for (uint64_t seen = 0, turn; (turn = par_wait(t, seen)) != seen; seen = turn)
        if (par_read(t, turn, &j)) par_work(t, &j, turn, self);
}

/* The team's region. The opening thread is one of its members; the context's own thread is not in
 * it. A host may be granted fewer threads than asked for: shares without a thread go to others. */
static void *par_region(void *arg) {
    par_team *t = arg;
#pragma omp parallel num_threads(t->threads - 1)
    par_member(t, omp_get_thread_num() + 1);
    return NULL;
}

/* Opens the region, unless that was tried before. Signals stay with the host's threads. */
static void par_open(par_team *t) {
    if (t->opened) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    t->opened = pthread_create(&t->opener, NULL, par_region, t) ? -1 : 1;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
#endif

/* A team for ctx in memory from its hook, or null. Threads start when there is work for them. */
static par_team *par_new(rlhf_ctx *ctx) {
    size_t size = sizeof(par_team) + (size_t)ctx->threads * sizeof(par_lane) + RLHF_ALIGN;
    char *block = ctx->hooks.alloc(ctx->hooks.user, size);
    if (!block) return NULL;
    memset(block, 0, size);
    par_team *t = (par_team *)(void *)(block + RLHF_ALIGN - (uintptr_t)block % RLHF_ALIGN);
    t->block = block;
    t->size = size;
    t->threads = ctx->threads;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    return t;
}

/* Ends the region and gives the team back. */
static void par_free(rlhf_ctx *ctx) {
    par_team *t = ctx->team;
    pthread_mutex_lock(&t->lock);
    atomic_store(&t->leave, 1);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
    if (t->opened > 0) pthread_join(t->opener, NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    ctx->hooks.free(ctx->hooks.user, t->block, t->size);
}

/* Calls fn on pieces of [0, n), each of them a multiple of grain long but the last. Returns when
 * all are done. Shares are even in units of grain; work whose units differ in cost asks for a grain
 * of one unit and many units. */
static void par_for(rlhf_ctx *ctx, int64_t n, int64_t grain, par_fn fn, void *arg) {
    int64_t units = (n + grain - 1) / grain;
    int shares = ctx->threads < units ? ctx->threads : (int)units;
    if (shares <= 1) {
        if (n > 0) fn(arg, 0, n, 0);
        return;
    }
#ifdef _OPENMP
    par_team *t = ctx->team;
    par_open(t);
    int pieces = units / shares < PAR_PIECES ? (int)(units / shares) : PAR_PIECES;
    par_job j = {fn, arg, n, units, grain, shares, pieces};
    t->asked += (uint64_t)shares * (uint64_t)pieces;
    uint64_t number = par_post(t, &j);
    /* A thread goes to sleep only after it has seen no newer job: one of the two sees the other. */
    if (atomic_load(&t->asleep)) {
        pthread_mutex_lock(&t->lock);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->lock);
    }
    par_work(t, &j, number, 0);
    for (int i = 0; !par_done(t); i++) {
        RLHF_PAUSE();
        if (i > 4096) sched_yield(); /* whoever has the last piece may be waiting for this core */
    }
#else
    fn(arg, 0, n, 0);
#endif
}

/* ============================================================================================
 * MARK: - 06 VEC (v_ vi_ v16_)
 * The vocabulary that kernels are written in: v16, sixteen virtual lanes, which are two AVX2
 * registers or four NEON registers. A reduction keeps sixteen partial results and joins them by one
 * tree (8, 4, 2, 1), in every instruction set and in the plain-C twins, hence the same bits
 * everywhere. exp, log, tanh, erf, sin and cos are polynomials over the vocabulary; v_exp1 ...
 * v_cos1 are the same sequences of operations in plain C.
 * Names: v_x1 is plain C on one number, v_x one register of floats (vf), vi_x one of integers (vi),
 *        v16_x sixteen lanes. A comparison yields a mask: all bits of a lane set or none.
 * Invariant: a vector function and its twin do the same roundings in the same order; nothing is
 *        used that only one instruction set has (reciprocal estimates, flush to zero).
 * Tests: test/test_kern.c (against double precision, and lane against scalar bit for bit)
 * ============================================================================================ */

/* In front of a loop over an array of registers: unrolled at any optimisation level, since only
 * then are its elements registers. */
#if defined(__clang__)
#define V_UNROLL _Pragma("unroll")
#else
#define V_UNROLL _Pragma("GCC unroll 16")
#endif

/* ---- constants of the polynomials (S. Moshier's Cephes; parts of pi/2 and ln 2 so that fma
 * reduces exactly) ---- */

#define V_LOG2E 1.44269504088896341f
#define V_LN2_HI 0.693359375f /* 9 bits: n V_LN2_HI is exact */
#define V_LN2_LO (-2.12194440e-4f)
#define V_EXP_HI 89.0f     /* e^89 is infinite in single precision */
#define V_EXP_LO (-104.0f) /* e^-104 is below half the smallest denormal */
#define V_2_PI 0.636619772367581343f
#define V_PIO2_1 1.57079637050628662109375f /* pi / 2 in three parts of 24 bits */
#define V_PIO2_2 (-4.37113882867379109e-8f)
#define V_PIO2_3 (-1.71512451225206e-15f)
#define V_TANH_SMALL 0.625f  /* below, 1 - 2 / (e^2x + 1) would lose digits */
#define V_ERF_SMALL 0.84375f /* below, 1 - erfc would lose digits */
#define V_ERF_ONE 4.0f       /* from here on erf is 1 in single precision */

/* Highest power first, for Horner's scheme with one fma a step. The polynomials stand for
 *     e^r = 1 + r + r^2 exp_c(r)                      |r| <= ln 2 / 2
 *     ln(1 + f) = f - f^2 / 2 + f^3 log_c(f)          sqrt(1/2) - 1 <= f < sqrt 2 - 1
 *     tanh x = x + x^3 tanh_c(x^2)                    |x| < 0.625
 *     erf x = x + x erf_c(x^2)                        |x| < 0.84375
 *     erf x = 1 - e^-erfc_c(x)                        0.84375 <= x <= 4
 *     sin r = r + r^3 sin_c(r^2)                      |r| <= pi / 4
 *     cos r = 1 - r^2 / 2 + r^4 cos_c(r^2)
 * The two of erf are fits of this project, by weighted least squares to the smallest largest error
 * in units of the last place of erf. */
static const float v_exp_c[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
static const float v_log_c[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                 -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
static const float v_tanh_c[5] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                  1.33314422036e-1f, -3.33332819422e-1f};
static const float v_erf_c[6] = {-6.342947599478066e-4f,  5.055627785623074e-3f,
                                 -2.6805108413100243e-2f, 1.1282775551080704e-1f,
                                 -3.761257529258728e-1f,  1.2837916612625122e-1f};
static const float v_erfc_c[7] = {-2.0433070312719792e-4f, 3.1240428797900677e-3f,
                                  -2.2542783990502357e-2f, 1.0457314550876617e-1f,
                                  6.364675164222717e-1f,   1.1280901432037354f,
                                  9.782638517208397e-5f};
static const float v_sin_c[3] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
static const float v_cos_c[3] = {2.443315711809948e-5f, -1.388731625493765e-3f,
                                 4.166664568298827e-2f};

/* ---- plain C ---- */

/* The float with these bits, and the bits of a float. */
RLHF_INLINE float v_bits1(int32_t i) {
    float f;
    memcpy(&f, &i, sizeof f);
    return f;
}

RLHF_INLINE int32_t v_int1(float f) {
    int32_t i;
    memcpy(&i, &f, sizeof i);
    return i;
}

/* The nearest bfloat16, the upper half of a float's bits, the even one of two; NaN stays NaN. */
RLHF_INLINE uint16_t v_half1(float f) {
    uint32_t x = (uint32_t)v_int1(f);
    if ((x & 0x7fffffff) > 0x7f800000) return (uint16_t)(x >> 16 | 64);
    return (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

/* The float that a bfloat16 is. */
RLHF_INLINE float v_wide1(uint16_t h) { return v_bits1((int32_t)((uint32_t)h << 16)); }

/* e^x: x = n ln 2 + r, |r| <= ln 2 / 2; 2^n in two factors, so that results go down to the smallest
 * denormal and up to infinity without a branch. NaN stays NaN: both bounds are written so that the
 * comparison fails on it. */
static float v_exp1(float x) {
    x = V_EXP_HI < x ? V_EXP_HI : x;
    x = V_EXP_LO > x ? V_EXP_LO : x;
    if (x != x) return x;
    float n = rintf(x * V_LOG2E);
    /* Cody and Waite: n ln 2 in two parts; the first product is exact, so r has all its digits. */
    float r = fmaf(n, -V_LN2_HI, x);
    r = fmaf(n, -V_LN2_LO, r);
    /* e^r, then 2^n by exponent bits: each half of n is the exponent of a normal number. */
    float p = v_exp_c[0];
    for (int i = 1; i < 6; i++) p = fmaf(p, r, v_exp_c[i]);
    p = fmaf(p, r * r, r) + 1.0f;
    int32_t k = (int32_t)n, h = k >> 1;
    return p * v_bits1((int32_t)((uint32_t)(h + 127) << 23)) *
           v_bits1((int32_t)((uint32_t)(k - h + 127) << 23));
}

/* ln x: x = 2^e m, sqrt(1/2) <= m < sqrt 2. 0 gives -inf, negative numbers NaN; denormals are
 * scaled into the normal range first. */
static float v_log1(float x) {
    float in = x, e = 0;
    if (x < FLT_MIN) {
        x *= 8388608.0f;
        e = -23.0f;
    }
    /* Subtracting the bits of sqrt(1/2) puts the carry into the exponent exactly where m reaches
     * it. */
    int32_t i = v_int1(x), k = (int32_t)((uint32_t)i - 0x3f3504f3u) >> 23;
    float f = v_bits1((int32_t)((uint32_t)i - ((uint32_t)k << 23))) - 1.0f;
    e += (float)k;
    /* Small terms first: the sum is rounded once where it is large. */
    float z = f * f, p = v_log_c[0];
    for (int j = 1; j < 9; j++) p = fmaf(p, f, v_log_c[j]);
    p = (p * f) * z;
    p = fmaf(e, V_LN2_LO, p);
    p = fmaf(z, -0.5f, p);
    float y = fmaf(e, V_LN2_HI, f + p);
    if (in == 0) return -INFINITY;
    if (!(in > 0)) return NAN;
    return in == INFINITY ? in : y;
}

/* tanh x: an odd polynomial near 0, else 1 - 2 / (e^2|x| + 1) with the sign of x. For large |x| the
 * exponential is infinite and the quotient 0, hence exactly 1. */
static float v_tanh1(float x) {
    float a = fabsf(x), z = x * x, p = v_tanh_c[0];
    for (int i = 1; i < 5; i++) p = fmaf(p, z, v_tanh_c[i]);
    /* Both are computed, as in the vector, and one is picked. */
    float small = fmaf(p * z, x, x);
    float big = 1.0f - 2.0f / (v_exp1(a + a) + 1.0f);
    return a < V_TANH_SMALL ? small : copysignf(big, x);
}

/* erf x = 2 / sqrt(pi) times the integral of e^-t^2 from 0 to x: an odd polynomial near 0, else
 * 1 - e^-p with the sign of x, p a polynomial that stands for -ln erfc. NaN stays NaN. */
static float v_erf1(float x) {
    float a = fabsf(x), z = x * x, p = v_erf_c[0], q = v_erfc_c[0];
    for (int i = 1; i < 6; i++) p = fmaf(p, z, v_erf_c[i]);
    float small = fmaf(p, x, x), b = V_ERF_ONE < a ? V_ERF_ONE : a;
    for (int i = 1; i < 7; i++) q = fmaf(q, b, v_erfc_c[i]);
    float big = 1.0f - v_exp1(-q);
    return a < V_ERF_SMALL ? small : copysignf(big, x);
}

/* sin and cos of |x| <= 1e5, which rotary angles and Box-Muller's respect: x = k pi/2 + r. The
 * three parts of pi / 2 leave r all its digits there. */
static void v_sincos1(float x, float *sine, float *cosine) {
    float k = rintf(x * V_2_PI);
    float r = fmaf(k, -V_PIO2_1, x);
    r = fmaf(k, -V_PIO2_2, r);
    r = fmaf(k, -V_PIO2_3, r);
    /* Both polynomials on [-pi/4, pi/4]. */
    float z = r * r;
    float s = fmaf(fmaf(v_sin_c[0], z, v_sin_c[1]), z, v_sin_c[2]);
    float c = fmaf(fmaf(v_cos_c[0], z, v_cos_c[1]), z, v_cos_c[2]);
    s = fmaf(s * z, r, r);
    c = fmaf(c * z, z, fmaf(z, -0.5f, 1.0f));
    /* The quadrant swaps the two and sets the signs. */
    int q = (int)k;
    float a = q & 1 ? c : s, b = q & 1 ? s : c;
    *sine = q & 2 ? -a : a;
    *cosine = (q + 1) & 2 ? -b : b;
}

/* 1 / (1 + e^-x). For very negative x the exponential is infinite and the result 0. */
static float v_sigmoid1(float x) { return 1.0f / (1.0f + v_exp1(-x)); }

/* Joins sixteen lanes as v16_sum does. acc is destroyed. */
static float v_tree1(float acc[RLHF_LANES]) {
    for (int w = RLHF_LANES / 2; w > 0; w /= 2)
        for (int l = 0; l < w; l++) acc[l] += acc[l + w];
    return acc[0];
}

/* ---- one register ---- */

/* vf and vi are one register of V_WIDTH lanes, V_COUNT of them make a v16. Each name below has the
 * same meaning in both blocks, to the bit. v_max and v_min return b where a comparison with NaN
 * fails, which x86 does by itself and NEON's own instructions do not. */
#if RLHF_X86
#define V_SIMD 1
#define V_OP RLHF_INLINE RLHF_TARGET
enum { V_WIDTH = 8, V_COUNT = 2 };
typedef __m256 vf;
typedef __m256i vi;
/* statement for each register; i is a constant, so that arrays of registers need no memory. */
#define V_EACH(statement)                                                                          \
    do {                                                                                           \
        {                                                                                          \
            enum { i = 0 };                                                                        \
            statement;                                                                             \
        }                                                                                          \
        {                                                                                          \
            enum { i = 1 };                                                                        \
            statement;                                                                             \
        }                                                                                          \
    } while (0)
V_OP vf v_load(const float *p) { return _mm256_loadu_ps(p); }
V_OP void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
V_OP vf v_set(float a) { return _mm256_set1_ps(a); }
V_OP vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_OP vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_OP vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_OP vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
V_OP vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); } /* a b + c */
V_OP vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
V_OP vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); } /* a > b ? a : b */
V_OP vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); } /* a < b ? a : b */
V_OP vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
V_OP vf v_less(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
V_OP vf v_equal(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
V_OP vf v_pick(vf mask, vf a, vf b) { return _mm256_blendv_ps(b, a, mask); } /* mask ? a : b */
V_OP vf v_and(vf a, vf b) { return _mm256_and_ps(a, b); }
V_OP vf v_or(vf a, vf b) { return _mm256_or_ps(a, b); }
V_OP vf v_xor(vf a, vf b) { return _mm256_xor_ps(a, b); }
V_OP vf v_of(vi a) { return _mm256_castsi256_ps(a); } /* the same bits */
V_OP vi vi_of(vf a) { return _mm256_castps_si256(a); }
V_OP vi vi_set(int32_t a) { return _mm256_set1_epi32(a); }
V_OP vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
V_OP vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
V_OP vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
V_OP vi vi_shr(vi a, int n) { return _mm256_srai_epi32(a, n); }
V_OP vi vi_shl(vi a, int n) { return _mm256_slli_epi32(a, n); }
V_OP vi vi_round(vf a) { return _mm256_cvtps_epi32(a); } /* to nearest, ties to even */
V_OP vf v_from(vi a) { return _mm256_cvtepi32_ps(a); }   /* the same number */
V_OP vi vi_equal(vi a, vi b) { return _mm256_cmpeq_epi32(a, b); }
/* V_WIDTH bfloat16 as floats; the upper halves of V_WIDTH numbers. */
V_OP vf v_widen(const uint16_t *p) {
    return v_of(vi_shl(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
V_OP void v_store_upper(uint16_t *p, vi a) {
    __m256i x = _mm256_srli_epi32(a, 16);
    x = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(x));
}
/* Joins the lanes of one register: 4, 2, 1. */
V_OP float v_sum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
/* V_WIDTH columns of V_WIDTH rows, ld apart: r[i] is column i. The halves of registers are put
 * together by the loads, since exchanging them between registers takes longer; then pairs, then
 * fours. */
V_OP void v_columns(const float *x, size_t ld, vf r[8]) {
    V_UNROLL
    for (int half = 0; half < 8; half += 4) {
        vf a[4], b[4];
        V_UNROLL
        for (int i = 0; i < 4; i++)
            a[i] = _mm256_insertf128_ps(
                _mm256_castps128_ps256(_mm_loadu_ps(x + (size_t)i * ld + half)),
                _mm_loadu_ps(x + (size_t)(i + 4) * ld + half), 1);
        V_UNROLL
        for (int i = 0; i < 4; i += 2) {
            b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
        }
        V_UNROLL
        for (int i = 0; i < 2; i++) {
            r[half + 2 * i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
            r[half + 2 * i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        }
    }
}
/* The largest lane; the order of comparisons does not matter, since no lane is NaN. */
V_OP float v_top(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
#elif RLHF_NEON
#define V_SIMD 1
#define V_OP RLHF_INLINE
enum { V_WIDTH = 4, V_COUNT = 4 };
typedef float32x4_t vf;
typedef int32x4_t vi;
#define V_EACH(statement)                                                                          \
    do {                                                                                           \
        {                                                                                          \
            enum { i = 0 };                                                                        \
            statement;                                                                             \
        }                                                                                          \
        {                                                                                          \
            enum { i = 1 };                                                                        \
            statement;                                                                             \
        }                                                                                          \
        {                                                                                          \
            enum { i = 2 };                                                                        \
            statement;                                                                             \
        }                                                                                          \
        {                                                                                          \
            enum { i = 3 };                                                                        \
            statement;                                                                             \
        }                                                                                          \
    } while (0)
V_OP vf v_load(const float *p) { return vld1q_f32(p); }
V_OP void v_store(float *p, vf a) { vst1q_f32(p, a); }
V_OP vf v_set(float a) { return vdupq_n_f32(a); }
V_OP vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
V_OP vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
V_OP vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
V_OP vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
V_OP vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
V_OP vf v_sqrt(vf a) { return vsqrtq_f32(a); }
V_OP vf v_round(vf a) { return vrndnq_f32(a); }
V_OP vf v_of(vi a) { return vreinterpretq_f32_s32(a); }
V_OP vi vi_of(vf a) { return vreinterpretq_s32_f32(a); }
V_OP vf v_less(vf a, vf b) { return vreinterpretq_f32_u32(vcltq_f32(a, b)); }
V_OP vf v_equal(vf a, vf b) { return vreinterpretq_f32_u32(vceqq_f32(a, b)); }
V_OP vf v_pick(vf mask, vf a, vf b) { return vbslq_f32(vreinterpretq_u32_f32(mask), a, b); }
V_OP vf v_max(vf a, vf b) { return v_pick(v_less(b, a), a, b); } /* a > b ? a : b */
V_OP vf v_min(vf a, vf b) { return v_pick(v_less(a, b), a, b); } /* a < b ? a : b */
V_OP vf v_and(vf a, vf b) { return v_of(vandq_s32(vi_of(a), vi_of(b))); }
V_OP vf v_or(vf a, vf b) { return v_of(vorrq_s32(vi_of(a), vi_of(b))); }
V_OP vf v_xor(vf a, vf b) { return v_of(veorq_s32(vi_of(a), vi_of(b))); }
V_OP vi vi_set(int32_t a) { return vdupq_n_s32(a); }
V_OP vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
V_OP vi vi_sub(vi a, vi b) { return vsubq_s32(a, b); }
V_OP vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
V_OP vi vi_shr(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(-n)); }
V_OP vi vi_shl(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
V_OP vi vi_round(vf a) { return vcvtnq_s32_f32(a); }
V_OP vf v_from(vi a) { return vcvtq_f32_s32(a); }
V_OP vi vi_equal(vi a, vi b) { return vreinterpretq_s32_u32(vceqq_s32(a, b)); }
V_OP vf v_widen(const uint16_t *p) {
    return v_of(vshll_n_s16(vreinterpret_s16_u16(vld1_u16(p)), 16));
}
V_OP void v_store_upper(uint16_t *p, vi a) {
    vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_s32(a), 16));
}
/* Joins the lanes of one register: 2, 1. */
V_OP float v_sum(vf a) {
    float32x2_t x = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(x, 0) + vget_lane_f32(x, 1);
}
V_OP float v_top(vf a) { return vmaxnmvq_f32(a); }
/* Pairs, then halves. */
V_OP void v_columns(const float *x, size_t ld, vf r[4]) {
    float32x4x2_t a = vtrnq_f32(v_load(x), v_load(x + ld));
    float32x4x2_t b = vtrnq_f32(v_load(x + 2 * ld), v_load(x + 3 * ld));
    for (int i = 0; i < 2; i++) {
        r[i] = vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i]));
        r[i + 2] = vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i]));
    }
}
#endif

#if V_SIMD

/* The twins of v_exp1, v_log1, v_tanh1, v_erf1 and v_sincos1, line by line: branches become v_pick.
 */
V_OP vf v_exp(vf x) {
    x = v_min(v_set(V_EXP_HI), x);
    x = v_max(v_set(V_EXP_LO), x);
    vf n = v_round(v_mul(x, v_set(V_LOG2E)));
    vf r = v_fma(n, v_set(-V_LN2_HI), x);
    r = v_fma(n, v_set(-V_LN2_LO), r);
    vf p = v_set(v_exp_c[0]);
    p = v_fma(p, r, v_set(v_exp_c[1]));
    p = v_fma(p, r, v_set(v_exp_c[2]));
    p = v_fma(p, r, v_set(v_exp_c[3]));
    p = v_fma(p, r, v_set(v_exp_c[4]));
    p = v_fma(p, r, v_set(v_exp_c[5]));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    vi k = vi_round(n), h = vi_shr(k, 1), bias = vi_set(127);
    vf lo = v_of(vi_shl(vi_add(h, bias), 23));
    vf hi = v_of(vi_shl(vi_add(vi_sub(k, h), bias), 23));
    return v_mul(v_mul(p, lo), hi);
}

V_OP vf v_log(vf x) {
    /* The mask keeps -23 where x was scaled by 2^23 and makes 0 of it elsewhere. */
    vf in = x, tiny = v_less(x, v_set(FLT_MIN));
    x = v_pick(tiny, v_mul(x, v_set(8388608.0f)), x);
    vf e = v_and(tiny, v_set(-23.0f));
    vi i = vi_of(x), k = vi_shr(vi_sub(i, vi_set(0x3f3504f3)), 23);
    vf f = v_sub(v_of(vi_sub(i, vi_shl(k, 23))), v_set(1.0f));
    e = v_add(e, v_from(k));
    vf z = v_mul(f, f), p = v_set(v_log_c[0]);
    p = v_fma(p, f, v_set(v_log_c[1]));
    p = v_fma(p, f, v_set(v_log_c[2]));
    p = v_fma(p, f, v_set(v_log_c[3]));
    p = v_fma(p, f, v_set(v_log_c[4]));
    p = v_fma(p, f, v_set(v_log_c[5]));
    p = v_fma(p, f, v_set(v_log_c[6]));
    p = v_fma(p, f, v_set(v_log_c[7]));
    p = v_fma(p, f, v_set(v_log_c[8]));
    p = v_mul(v_mul(p, f), z);
    p = v_fma(e, v_set(V_LN2_LO), p);
    p = v_fma(z, v_set(-0.5f), p);
    /* Later picks win: infinity, then what is not positive, then zero. */
    vf y = v_fma(e, v_set(V_LN2_HI), v_add(f, p));
    y = v_pick(v_equal(in, v_set(INFINITY)), in, y);
    y = v_pick(v_less(v_set(0), in), y, v_set(NAN));
    return v_pick(v_equal(in, v_set(0)), v_set(-INFINITY), y);
}

V_OP vf v_tanh(vf x) {
    /* -0.0 has the sign bit alone. */
    vf sign = v_and(x, v_set(-0.0f)), a = v_xor(x, sign), z = v_mul(x, x);
    vf p = v_set(v_tanh_c[0]);
    p = v_fma(p, z, v_set(v_tanh_c[1]));
    p = v_fma(p, z, v_set(v_tanh_c[2]));
    p = v_fma(p, z, v_set(v_tanh_c[3]));
    p = v_fma(p, z, v_set(v_tanh_c[4]));
    vf small = v_fma(v_mul(p, z), x, x);
    vf one = v_set(1.0f);
    vf big = v_sub(one, v_div(v_set(2.0f), v_add(v_exp(v_add(a, a)), one)));
    return v_pick(v_less(a, v_set(V_TANH_SMALL)), small, v_or(big, sign));
}

V_OP vf v_erf(vf x) {
    vf sign = v_and(x, v_set(-0.0f)), a = v_xor(x, sign), z = v_mul(x, x);
    vf p = v_set(v_erf_c[0]), q = v_set(v_erfc_c[0]);
    p = v_fma(p, z, v_set(v_erf_c[1]));
    p = v_fma(p, z, v_set(v_erf_c[2]));
    p = v_fma(p, z, v_set(v_erf_c[3]));
    p = v_fma(p, z, v_set(v_erf_c[4]));
    p = v_fma(p, z, v_set(v_erf_c[5]));
    vf small = v_fma(p, x, x), b = v_min(v_set(V_ERF_ONE), a);
    q = v_fma(q, b, v_set(v_erfc_c[1]));
    q = v_fma(q, b, v_set(v_erfc_c[2]));
    q = v_fma(q, b, v_set(v_erfc_c[3]));
    q = v_fma(q, b, v_set(v_erfc_c[4]));
    q = v_fma(q, b, v_set(v_erfc_c[5]));
    q = v_fma(q, b, v_set(v_erfc_c[6]));
    vf big = v_sub(v_set(1.0f), v_exp(v_xor(q, v_set(-0.0f))));
    return v_pick(v_less(a, v_set(V_ERF_SMALL)), small, v_or(big, sign));
}

V_OP void v_sincos(vf x, vf *sine, vf *cosine) {
    vf k = v_round(v_mul(x, v_set(V_2_PI)));
    vf r = v_fma(k, v_set(-V_PIO2_1), x);
    r = v_fma(k, v_set(-V_PIO2_2), r);
    r = v_fma(k, v_set(-V_PIO2_3), r);
    vf z = v_mul(r, r);
    vf s = v_fma(v_fma(v_set(v_sin_c[0]), z, v_set(v_sin_c[1])), z, v_set(v_sin_c[2]));
    vf c = v_fma(v_fma(v_set(v_cos_c[0]), z, v_set(v_cos_c[1])), z, v_set(v_cos_c[2]));
    s = v_fma(v_mul(s, z), r, r);
    c = v_fma(v_mul(c, z), z, v_fma(z, v_set(-0.5f), v_set(1.0f)));
    /* Bit 0 of the quadrant picks, bit 1 of it and of its successor becomes the sign bit. */
    vi q = vi_round(k), one = vi_set(1), two = vi_set(2);
    vf odd = v_of(vi_equal(vi_and(q, one), one));
    vf a = v_pick(odd, c, s), b = v_pick(odd, s, c);
    *sine = v_xor(a, v_of(vi_shl(vi_and(q, two), 30)));
    *cosine = v_xor(b, v_of(vi_shl(vi_and(vi_add(q, one), two), 30)));
}

/* The bits of v_half1 in the upper half, zeros below. */
V_OP vi vi_half(vf x) {
    vi u = vi_of(x), odd = vi_and(vi_shr(u, 16), vi_set(1));
    vi r = vi_add(u, vi_add(odd, vi_set(0x7fff)));
    vi number = vi_of(v_equal(x, x)),
       quiet = vi_add(u, vi_sub(vi_set(0x400000), vi_and(u, vi_set(0x400000))));
    r = vi_of(v_pick(v_of(number), v_of(r), v_of(quiet)));
    return vi_and(r, vi_set((int32_t)0xffff0000));
}

/* ---- sixteen lanes ---- */

/* Sixteen floats: lane l is lane l % V_WIDTH of register l / V_WIDTH. */
typedef struct v16 {
    vf r[V_COUNT];
} v16;

/* Lane-wise functions of one and of two arguments. */
#define V16_1(name, op)                                                                            \
    V_OP v16 name(v16 a) {                                                                         \
        v16 o;                                                                                     \
        V_EACH(o.r[i] = op(a.r[i]));                                                               \
        return o;                                                                                  \
    }
#define V16_2(name, op)                                                                            \
    V_OP v16 name(v16 a, v16 b) {                                                                  \
        v16 o;                                                                                     \
        V_EACH(o.r[i] = op(a.r[i], b.r[i]));                                                       \
        return o;                                                                                  \
    }

V16_2(v16_add, v_add)
V16_2(v16_sub, v_sub)
V16_2(v16_mul, v_mul)
V16_2(v16_div, v_div)
V16_2(v16_max, v_max)
V16_1(v16_sqrt, v_sqrt)
V16_1(v16_exp, v_exp)
V16_1(v16_log, v_log)
V16_1(v16_tanh, v_tanh)
V16_1(v16_erf, v_erf)

/* a b + c, rounded once. */
V_OP v16 v16_fma(v16 a, v16 b, v16 c) {
    v16 o;
    V_EACH(o.r[i] = v_fma(a.r[i], b.r[i], c.r[i]));
    return o;
}

/* a in every lane. */
V_OP v16 v16_set(float a) {
    v16 o;
    V_EACH(o.r[i] = v_set(a));
    return o;
}

/* The sign flipped, also of zeros and NaN, as C's unary minus does. */
V_OP v16 v16_neg(v16 a) {
    v16 o;
    V_EACH(o.r[i] = v_xor(a.r[i], v_set(-0.0f)));
    return o;
}

V_OP void v16_sincos(v16 a, v16 *s, v16 *c) { V_EACH(v_sincos(a.r[i], &s->r[i], &c->r[i])); }

/* p[0..15], of any alignment. */
V_OP v16 v16_load(const float *p) {
    v16 o;
    V_EACH(o.r[i] = v_load(p + i * V_WIDTH));
    return o;
}

V_OP void v16_store(float *p, v16 a) { V_EACH(v_store(p + i * V_WIDTH, a.r[i])); }

/* The first n lanes from p, the others fill. Reads nothing beyond p[n-1]: the last columns of a row
 * may end at the end of a block. n >= 16 is the plain load, so that loops need no tail. */
V_OP v16 v16_get(const float *p, int n, float fill) {
    if (n >= RLHF_LANES) return v16_load(p);
    float t[RLHF_LANES];
    v16_store(t, v16_set(fill));
    memcpy(t, p, (size_t)n * sizeof *p);
    return v16_load(t);
}

/* The first n lanes to p. Writes nothing beyond p[n-1]. */
V_OP void v16_put(float *p, int n, v16 a) {
    if (n >= RLHF_LANES) {
        v16_store(p, a);
        return;
    }
    float t[RLHF_LANES];
    v16_store(t, a);
    memcpy(p, t, (size_t)n * sizeof *p);
}

/* Lanes from n on become 0, whatever they held: fill values have gone through arithmetic by
 * then. */
V_OP v16 v16_keep(v16 a, int n) {
    if (n >= RLHF_LANES) return a;
    float t[RLHF_LANES];
    v16_store(t, a);
    return v16_get(t, n, 0);
}

/* The sum by the tree 8, 4, 2, 1: lane l + lane l + 8, and so on. On NEON registers 0 and 2, 1 and
 * 3 are eight lanes apart. v_tree1 is the twin. */
V_OP float v16_sum(v16 a) {
#if RLHF_X86
    return v_sum(v_add(a.r[0], a.r[1]));
#else
    return v_sum(v_add(v_add(a.r[0], a.r[2]), v_add(a.r[1], a.r[3])));
#endif
}

/* The largest lane. */
V_OP float v16_top(v16 a) {
#if RLHF_X86
    return v_top(v_max(a.r[0], a.r[1]));
#else
    return v_top(v_max(v_max(a.r[0], a.r[2]), v_max(a.r[1], a.r[3])));
#endif
}

#endif

/* ============================================================================================
 * MARK: - 07 KERN (k_)
 * Row kernels. Each is written once over the vocabulary (k_v_*) and once in plain C (k_r_*), which
 * is the oracle in tests and what old processors run; both give the same bits. A context holds one
 * table of them. n is a number of columns; no alignment is asked for; where an output may be an
 * input the comment says so. Formulas and contracts stand above the plain-C twins; the vector ones
 * follow in the same order.
 * Invariant: element i of a row reduction goes into lane i % 16; missing lanes of the last group
 *        add exact zeros.
 * Tests: test/test_kern.c
 * ============================================================================================ */

/* What one pass over a row of logits z = x * scale yields. */
typedef struct k_stats {
    float max, lse, entropy; /* max z; log sum e^z; entropy of the softmax, nats */
} k_stats;

/* Constants of one optimizer step, rounded to single precision once. */
typedef struct k_adam {
    float lr, beta1, beta2, eps, decay; /* decay = 1 - lr * weight_decay, or 1 */
    float rest1, rest2;                 /* 1 - beta, rounded once */
    float fix1, fix2;                   /* 1 / (1 - beta1^t), 1 / (1 - beta2^t) */
    float clip;                         /* factor on the gradient */
} k_adam;

/* k_v_ and k_r_ functions have these types. x, y, dy and the like are rows of n floats; w and b a
 * norm's weight and bias [n]; mean, rstd, lse, max and sum one number of the row, in or out. What
 * an output does to what it held (overwrite, add) stands at the kernel. */
typedef void k_map_fn(int n, const float *x, float *y);
typedef void k_sincos_fn(int n, const float *x, float *s, float *c);
typedef float k_dot_fn(int n, const float *a, const float *b);
typedef void k_rms_fn(int n, const float *x, const float *w, float base, float eps, float *y,
                      float *rstd);
typedef void k_rms_bwd_fn(int n, const float *dy, const float *x, const float *w, float base,
                          float rstd, float *dx);
typedef void k_ln_fn(int n, const float *x, const float *w, const float *b, float eps, float *y,
                     float *mean, float *rstd);
typedef void k_ln_bwd_fn(int n, const float *dy, const float *x, const float *w, float mean,
                         float rstd, float *dx);
typedef void k_norm_dw_fn(int n, const float *dy, const float *x, float mean, float rstd,
                          float *dw);
typedef void k_act_bwd_fn(int n, const float *x, const float *dy, float *dx, float *y);
typedef void k_glu_fn(int n, const float *gate, const float *up, float *y);
typedef void k_glu_bwd_fn(int n, const float *gate, const float *up, const float *dy, float *dgate,
                          float *dup, float *y);
typedef void k_rope_fn(int half, float *x, const float *c, const float *s, float sign);
typedef k_stats k_stats_fn(int n, const float *x, float scale);
typedef void k_ce_fn(int n, float *x, float scale, float lse, float coef);
typedef double k_kl_fn(int n, const float *p, const float *q, float scale, float lse_p,
                       float lse_q);
typedef float k_softmax_fn(int n, float *s, float scale, float *max, float *sum);
typedef void k_prob_fn(int n, float *s, float scale, float lse);
typedef void k_ds_fn(int n, const float *p, float *dp, float d, float scale);
typedef void k_scale_fn(int n, float *x, float a);
typedef void k_cap_fn(int n, float *x, float in, float out);
typedef void k_cap_bwd_fn(int n, const float *y, float in, float *d);
typedef void k_panel_fn(int n, const float *x, size_t ld, float *y);
typedef void k_half_fn(int n, const float *x, size_t step, uint16_t *y);
typedef void k_wide_fn(int n, const uint16_t *x, float *y);
typedef void k_pairs_fn(int n, int pairs, int strips, int w, const float *x, size_t ld, float *y);
typedef double k_sumsq_fn(int64_t n, const float *x);
typedef void k_adam_fn(int64_t n, float *p, float *g, float *m, float *v, const k_adam *a);

/* Product tiles (08): rows of A against panels of B. */
struct gemm_tile_args;
typedef void k_tile_fn(int rows, int panels, const struct gemm_tile_args *t);

/* Every kernel: its name and type. The list makes the members of k_table and fills each table, so
 * that a kernel without one of its twins does not compile. */
#define K_KERNELS(X)                                                                               \
    X(exp, k_map_fn)                                                                               \
    X(log, k_map_fn)                                                                               \
    X(tanh, k_map_fn)                                                                              \
    X(sincos, k_sincos_fn)                                                                         \
    X(add, k_map_fn)                                                                               \
    X(scale, k_scale_fn)                                                                           \
    X(dot, k_dot_fn)                                                                               \
    X(rms, k_rms_fn)                                                                               \
    X(rms_bwd, k_rms_bwd_fn)                                                                       \
    X(ln, k_ln_fn)                                                                                 \
    X(ln_bwd, k_ln_bwd_fn)                                                                         \
    X(norm_dw, k_norm_dw_fn)                                                                       \
    X(gelu, k_map_fn)                                                                              \
    X(gelu_bwd, k_act_bwd_fn)                                                                      \
    X(erf, k_map_fn)                                                                               \
    X(gelu_erf, k_map_fn)                                                                          \
    X(gelu_erf_bwd, k_act_bwd_fn)                                                                  \
    X(glu, k_glu_fn)                                                                               \
    X(glu_bwd, k_glu_bwd_fn)                                                                       \
    X(geglu, k_glu_fn)                                                                             \
    X(geglu_bwd, k_glu_bwd_fn)                                                                     \
    X(cap, k_cap_fn)                                                                               \
    X(cap_bwd, k_cap_bwd_fn)                                                                       \
    X(rope, k_rope_fn)                                                                             \
    X(stats, k_stats_fn)                                                                           \
    X(ce, k_ce_fn)                                                                                 \
    X(kl, k_kl_fn)                                                                                 \
    X(softmax, k_softmax_fn)                                                                       \
    X(prob, k_prob_fn)                                                                             \
    X(ds, k_ds_fn)                                                                                 \
    X(panel, k_panel_fn)                                                                           \
    X(wide, k_wide_fn)                                                                             \
    X(sumsq, k_sumsq_fn)                                                                           \
    X(adam, k_adam_fn)

/* The tiles (08) for one kind of product. */
typedef struct k_tiles {
    k_tile_fn *tile;
    int rows;                          /* height of the full tile */
    uint8_t panels[33];                /* panels[r]: widest tile of r rows, in sixteen columns */
    void (*begin)(void), (*end)(void); /* around a block of tiles; null: nothing to do */
    k_half_fn *half;                   /* for bfloat16: how operands are packed */
    k_pairs_fn *pairs;
    double (*peak)(int64_t rounds, float *sink); /* does multiply-adds in registers alone; returns
                                                    how many operations; null: unknown */
} k_tiles;

/* The kernels of one instruction set. */
typedef struct k_table {
    const char *name;       /* as in --isa and rlhf_isas() */
    int (*available)(void); /* whether this processor can run them */
#define K_MEMBER(name, type) type *name;
    K_KERNELS(K_MEMBER)
#undef K_MEMBER
    k_tiles f32, bf16;
    int blocks; /* bf16 reads A in squares of sixteen rows by sixteen pairs */
} k_table;

#define K_GELU_A 0.7978845608028654f /* sqrt(2 / pi) */
#define K_GELU_B 0.044715f
#define K_ROOT_HALF 0.7071067811865476f /* 1 / sqrt 2 */
#define K_NORMAL 0.3989422804014327f    /* 1 / sqrt(2 pi) */

/* How many rows ahead of their use rows that are cut into strips are asked for: they lie too far
 * apart for the processor to see a pattern. */
enum { K_ROWS_AHEAD = 12 };

/* ---- plain C ---- */

/* y = exp x, log x, tanh x, element by element; y may be x. */
static void k_r_exp(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] = v_exp1(x[i]);
}

static void k_r_log(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] = v_log1(x[i]);
}

static void k_r_tanh(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] = v_tanh1(x[i]);
}

/* s = sin x, c = cos x; c may be x. */
static void k_r_sincos(int n, const float *x, float *s, float *c) {
    for (int i = 0; i < n; i++) v_sincos1(x[i], s + i, c + i);
}

/* y += x */
static void k_r_add(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] += x[i];
}

/* sum a b, in lanes: one chain of fma for each, then the tree. Every reduction below has this
 * shape. */
static float k_r_dot(int n, const float *a, const float *b) {
    float acc[RLHF_LANES] = {0};
    for (int i = 0; i < n; i++) acc[i % RLHF_LANES] = fmaf(a[i], b[i], acc[i % RLHF_LANES]);
    return v_tree1(acc);
}

/* RMSNorm (Zhang and Sennrich 2019): y = x rstd (base + w), rstd = 1 / sqrt(mean x^2 + eps). base
 * is 0, or 1 where the weights are stored as deviations from 1 (Gemma). y may be x. rstd is kept
 * for the backward pass. */
static void k_r_rms(int n, const float *x, const float *w, float base, float eps, float *y,
                    float *rstd) {
    float r = 1.0f / sqrtf(k_r_dot(n, x, x) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] * r) * (w[i] + base);
    *rstd = r;
}

/* Its gradient, added to dx, with g = dy (base + w):
 *     dx += rstd g - x rstd^3 / n sum(g x)
 * the first term by the scale, the second because rstd depends on every x. */
static void k_r_rms_bwd(int n, const float *dy, const float *x, const float *w, float base,
                        float rstd, float *dx) {
    float acc[RLHF_LANES] = {0};
    for (int i = 0; i < n; i++) {
        float g = dy[i] * (w[i] + base);
        acc[i % RLHF_LANES] = fmaf(g, x[i], acc[i % RLHF_LANES]);
    }
    float c = -(v_tree1(acc) / (float)n) * rstd * rstd * rstd;
    for (int i = 0; i < n; i++) dx[i] += fmaf(x[i], c, (dy[i] * (w[i] + base)) * rstd);
}

/* LayerNorm (Ba, Kiros and Hinton 2016): y = (x - mean) rstd w + b, rstd = 1 / sqrt(var + eps),
 * with the biased variance. Two passes: the variance of deviations does not cancel as mean x^2 -
 * mean^2 would. */
static void k_r_ln(int n, const float *x, const float *w, const float *b, float eps, float *y,
                   float *mean, float *rstd) {
    float acc[RLHF_LANES] = {0}, sq[RLHF_LANES] = {0};
    for (int i = 0; i < n; i++) acc[i % RLHF_LANES] += x[i];
    float m = v_tree1(acc) / (float)n;
    for (int i = 0; i < n; i++) {
        float d = x[i] - m;
        sq[i % RLHF_LANES] = fmaf(d, d, sq[i % RLHF_LANES]);
    }
    float r = 1.0f / sqrtf(v_tree1(sq) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = fmaf((x[i] - m) * r, w[i], b[i]);
    *mean = m;
    *rstd = r;
}

/* Its gradient, added to dx. With xh = (x - mean) rstd and g = dy w:
 *     dx += rstd (g - mean(g) - xh mean(g xh))
 * the means being what x contributes through the mean and through the variance. */
static void k_r_ln_bwd(int n, const float *dy, const float *x, const float *w, float mean,
                       float rstd, float *dx) {
    float a[RLHF_LANES] = {0}, b[RLHF_LANES] = {0};
    for (int i = 0; i < n; i++) {
        float g = dy[i] * w[i], xh = (x[i] - mean) * rstd;
        a[i % RLHF_LANES] += g;
        b[i % RLHF_LANES] = fmaf(g, xh, b[i % RLHF_LANES]);
    }
    float m1 = v_tree1(a) / (float)n, m2 = v_tree1(b) / (float)n;
    for (int i = 0; i < n; i++) {
        float xh = (x[i] - mean) * rstd;
        dx[i] = fmaf(fmaf(-xh, m2, dy[i] * w[i] - m1), rstd, dx[i]);
    }
}

/* One row's part of the norm weight's gradient, both norms (RMS: mean 0): dw += dy (x - mean) rstd.
 * Rows are added in their order by the caller. */
static void k_r_norm_dw(int n, const float *dy, const float *x, float mean, float rstd, float *dw) {
    for (int i = 0; i < n; i++) dw[i] = fmaf(dy[i], (x[i] - mean) * rstd, dw[i]);
}

/* GELU, tanh form (Hendrycks and Gimpel 2016), GPT-2's "gelu_new": y = x/2 (1 + tanh(a (x + b
 * x^3))), a = sqrt(2 / pi), b = 0.044715. y may be x. */
static void k_r_gelu(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) {
        float u = x[i], t = v_tanh1((u * K_GELU_A) * fmaf(u * u, K_GELU_B, 1.0f));
        y[i] = (u * 0.5f) * (t + 1.0f);
    }
}

/* dx = dy gelu'(x), with t the tanh above; and y again, which then need not be kept. dx may be dy.
 *     gelu'(x) = (1 + t) / 2 + x/2 (1 - t^2) a (1 + 3 b x^2) */
static void k_r_gelu_bwd(int n, const float *x, const float *dy, float *dx, float *y) {
    for (int i = 0; i < n; i++) {
        float u = x[i], q = u * u, t = v_tanh1((u * K_GELU_A) * fmaf(q, K_GELU_B, 1.0f));
        float inner = fmaf(q, 3.0f * K_GELU_B, 1.0f) * K_GELU_A;
        float sech2 = fmaf(-t, t, 1.0f), half = u * 0.5f;
        dx[i] = fmaf(half * sech2, inner, (t + 1.0f) * 0.5f) * dy[i];
        y[i] = half * (t + 1.0f);
    }
}

/* y = erf x; y may be x. */
static void k_r_erf(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) y[i] = v_erf1(x[i]);
}

/* GELU as defined (Hendrycks and Gimpel 2016): y = x/2 (1 + erf(x / sqrt 2)). y may be x. */
static void k_r_gelu_erf(int n, const float *x, float *y) {
    for (int i = 0; i < n; i++) {
        float u = x[i];
        y[i] = (u * 0.5f) * (v_erf1(u * K_ROOT_HALF) + 1.0f);
    }
}

/* dx = dy gelu'(x), gelu'(x) = (1 + erf(x / sqrt 2)) / 2 + x e^(-x^2/2) / sqrt(2 pi); and y again.
 * dx may be dy. */
static void k_r_gelu_erf_bwd(int n, const float *x, const float *dy, float *dx, float *y) {
    for (int i = 0; i < n; i++) {
        float u = x[i], e = v_exp1((u * -0.5f) * u), p = v_erf1(u * K_ROOT_HALF) + 1.0f;
        dx[i] = fmaf(u * K_NORMAL, e, p * 0.5f) * dy[i];
        y[i] = (u * 0.5f) * p;
    }
}

/* SwiGLU (Shazeer 2020): y = silu(gate) up, silu(g) = g sigmoid(g). y may be either input. */
static void k_r_glu(int n, const float *gate, const float *up, float *y) {
    for (int i = 0; i < n; i++) y[i] = (gate[i] * v_sigmoid1(gate[i])) * up[i];
}

/* Its gradients, overwriting; with s = sigmoid(g):
 *     dup = dy silu(g)        dgate = dy up (s + silu(g) (1 - s))
 * and y again. No output is an input. */
static void k_r_glu_bwd(int n, const float *gate, const float *up, const float *dy, float *dgate,
                        float *dup, float *y) {
    for (int i = 0; i < n; i++) {
        float g = gate[i], s = v_sigmoid1(g), silu = g * s;
        dup[i] = dy[i] * silu;
        dgate[i] = (dy[i] * up[i]) * (fmaf(-silu, s, silu) + s);
        y[i] = silu * up[i];
    }
}

/* GeGLU (Shazeer 2020): y = gelu(gate) up with the tanh form of gelu. y may be either input. */
static void k_r_geglu(int n, const float *gate, const float *up, float *y) {
    for (int i = 0; i < n; i++) {
        float u = gate[i], t = v_tanh1((u * K_GELU_A) * fmaf(u * u, K_GELU_B, 1.0f));
        y[i] = ((u * 0.5f) * (t + 1.0f)) * up[i];
    }
}

/* Its gradients, overwriting: dup = dy gelu(gate), dgate = dy up gelu'(gate); and y again. No
 * output is an input. */
static void k_r_geglu_bwd(int n, const float *gate, const float *up, const float *dy, float *dgate,
                          float *dup, float *y) {
    for (int i = 0; i < n; i++) dgate[i] = dy[i] * up[i];
    k_r_gelu_bwd(n, gate, dgate, dgate, y);
    for (int i = 0; i < n; i++) {
        dup[i] = y[i] * dy[i];
        y[i] *= up[i];
    }
}

/* Soft cap (Gemma 2): x = out tanh(in x), in place; with in = scale / cap and out = cap it keeps
 * scale x within the cap. */
static void k_r_cap(int n, float *x, float in, float out) {
    for (int i = 0; i < n; i++) x[i] = v_tanh1(x[i] * in) * out;
}

/* Its slope times d, in place, from the outputs y and in = 1 / cap: d *= 1 - (y / cap)^2. The scale
 * is the caller's. */
static void k_r_cap_bwd(int n, const float *y, float in, float *d) {
    for (int i = 0; i < n; i++) {
        float t = y[i] * in;
        d[i] *= fmaf(-t, t, 1.0f);
    }
}

/* Rotary position (Su et al. 2021) in the layout of Llama's files: rotates the pairs (x[i], x[half
 * + i]) by the angle whose cosine and sine are given [half]; sign -1 rotates back, which is also
 * the gradient, a rotation being orthogonal. */
static void k_r_rope(int half, float *x, const float *c, const float *s, float sign) {
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[half + i], t = s[i] * sign;
        x[i] = fmaf(-b, t, a * c[i]);
        x[half + i] = fmaf(a, t, b * c[i]);
    }
}

/* What one row of n logits z = x scale says about softmax(z), in two passes. With d = z - max:
 *     lse = max + log sum e^d        entropy = log sum e^d - sum(d e^d) / sum e^d
 * Taking the maximum off keeps every e^d in [0, 1]. -inf is allowed (a token that is ruled out) as
 * long as one logit is finite, and only where the entropy is not read. */
static k_stats k_r_stats(int n, const float *x, float scale) {
    /* One pass for the maximum, one for both sums. */
    float m = -INFINITY, e[RLHF_LANES] = {0}, t[RLHF_LANES] = {0};
    for (int i = 0; i < n; i++) m = x[i] * scale > m ? x[i] * scale : m;
    for (int i = 0; i < n; i++) {
        float d = x[i] * scale - m, p = v_exp1(d);
        e[i % RLHF_LANES] += p;
        t[i % RLHF_LANES] = fmaf(p, d, t[i % RLHF_LANES]);
    }
    float sum = v_tree1(e), log_sum = v_log1(sum);
    return (k_stats){m, m + log_sum, log_sum - v_tree1(t) / sum};
}

/* x = coef e^(x scale - lse), in place: coef p. With coef = -scale d loss / d logp it is the
 * gradient of every logit; the target's gets its one-hot term besides (op_vocab_grad). */
static void k_r_ce(int n, float *x, float scale, float lse, float coef) {
    for (int i = 0; i < n; i++) x[i] = v_exp1(x[i] * scale - lse) * coef;
}

/* KL(P || Q) = sum p (log p - log q) of two rows of logits with the same scale, exact but for
 * rounding: over the whole vocabulary, not estimated from a sample. */
static double k_r_kl(int n, const float *p, const float *q, float scale, float lse_p, float lse_q) {
    float t[RLHF_LANES] = {0};
    for (int i = 0; i < n; i++) {
        float lp = p[i] * scale - lse_p, lq = q[i] * scale - lse_q;
        t[i % RLHF_LANES] = fmaf(v_exp1(lp), lp - lq, t[i % RLHF_LANES]);
    }
    return (double)v_tree1(t);
}

/* One tile of an online softmax (Milakov and Gimelshein 2018). s [n] scores become e^(s scale -
 * m'); max and sum run over the tiles of a row and start at -inf and 0:
 *     m' = max(m, max s scale)        sum' = sum e^(m - m') + sum e^(s scale - m')
 * Returns e^(m - m'), by which what was accumulated so far is to be multiplied. In the end lse =
 * max + log sum. */
static float k_r_softmax(int n, float *s, float scale, float *max, float *sum) {
    float m = *max, e[RLHF_LANES] = {0};
    for (int i = 0; i < n; i++) m = s[i] * scale > m ? s[i] * scale : m;
    /* The old maximum is -inf in a row's first tile: fix is then 0, and so is what it scales. */
    float fix = v_exp1(*max - m);
    for (int i = 0; i < n; i++) {
        s[i] = v_exp1(s[i] * scale - m);
        e[i % RLHF_LANES] += s[i];
    }
    *max = m;
    *sum = fmaf(*sum, fix, v_tree1(e));
    return fix;
}

/* s = e^(s scale - lse): the probabilities again, from scores and the lse of the forward pass. */
static void k_r_prob(int n, float *s, float scale, float lse) {
    for (int i = 0; i < n; i++) s[i] = v_exp1(s[i] * scale - lse);
}

/* dp = p (dp - d) scale, in place: the gradient of the scores behind a softmax, where d = sum p dp
 * over the whole row. */
static void k_r_ds(int n, const float *p, float *dp, float d, float scale) {
    for (int i = 0; i < n; i++) dp[i] = (p[i] * (dp[i] - d)) * scale;
}

/* x = a x */
static void k_r_scale(int n, float *x, float a) {
    for (int i = 0; i < n; i++) x[i] *= a;
}

/* w <= 16 columns of k numbers, element (k, l) at b[k ks + l ns], as rows of sixteen: out[k][16].
 * Columns from w on are left as they are. */
static void k_panel_part(int w, int n, const float *b, size_t ks, size_t ns, float *out) {
    for (int l = 0; l < w; l++)
        for (int k = 0; k < n; k++)
            out[(size_t)k * RLHF_LANES + (size_t)l] = b[(size_t)k * ks + (size_t)l * ns];
}

/* Sixteen rows of n numbers, ld apart, become a panel [n][16]: their transpose. */
static void k_r_panel(int n, const float *x, size_t ld, float *y) {
    k_panel_part(RLHF_LANES, n, x, 1, ld, y);
}

/* n floats as bfloat16. Every 32 of them, the output goes on `step` halves behind where those
 * began; it is filled with zeros up to a multiple of 16. */
static void k_r_half(int n, const float *x, size_t step, uint16_t *y) {
    for (int i = 0; i < (n + 15) / 16 * 16; i++)
        y[(size_t)(i / 32) * step + (size_t)(i % 32)] = i < n ? v_half1(x[i]) : 0;
}

/* n numbers of bfloat16 as floats. */
static void k_r_wide(int n, const uint16_t *x, float *y) {
    for (int i = 0; i < n; i++) y[i] = v_wide1(x[i]);
}

/* w columns of n numbers, element (k, l) at b[k ld + l], as bfloat16 in pairs (k, k + 1), the first
 * in the lower half: out[pairs][at most w], `stride` apart. Zeros stand for what lies behind n. */
static void k_pairs_part(int n, int pairs, int w, const float *b, size_t ld, float *out,
                         size_t stride) {
    for (int p = 0; p < pairs; p++)
        for (int l = 0; l < w; l++) {
            const float *x = b + (size_t)(2 * p) * ld + l;
            uint32_t lo = 2 * p < n ? v_half1(x[0]) : 0, hi = 2 * p + 1 < n ? v_half1(x[ld]) : 0;
            out[(size_t)p * stride + (size_t)l] = v_bits1((int32_t)(lo | hi << 16));
        }
}

/* As k_strips, with pairs of rows as bfloat16: y[strips][pairs][w], pairs >= n / 2. */
static void k_r_pairs(int n, int pairs, int strips, int w, const float *x, size_t ld, float *y) {
    for (int s = 0; s < strips; s++)
        k_pairs_part(n, pairs, w, x + s * w, ld, y + (size_t)s * (size_t)(pairs * w), (size_t)w);
}

/* Sum of squares in double; sixteen lanes, each square exact (24 + 24 bits fit into 53). In single
 * precision a sum over millions of parameters would lose digits. */
static double k_r_sumsq(int64_t n, const float *x) {
    double acc[RLHF_LANES] = {0};
    for (int64_t i = 0; i < n; i++) acc[i % RLHF_LANES] += (double)x[i] * (double)x[i];
    for (int w = RLHF_LANES / 2; w > 0; w /= 2)
        for (int l = 0; l < w; l++) acc[l] += acc[l + w];
    return acc[0];
}

/* AdamW (Loshchilov and Hutter 2019): decoupled decay, both moments corrected, eps outside the
 * root.
 *     u = clip g        m = b1 m + (1 - b1) u        v = b2 v + (1 - b2) u^2
 *     p = decay p - lr (m fix1) / (sqrt(v fix2) + eps)
 * p, m and v are updated in place; g becomes 0, ready for the next step's sums. */
static void k_r_adam(int64_t n, float *p, float *g, float *m, float *v, const k_adam *a) {
    for (int64_t i = 0; i < n; i++) {
        float u = g[i] * a->clip;
        m[i] = fmaf(m[i], a->beta1, u * a->rest1);
        v[i] = fmaf(v[i], a->beta2, (u * u) * a->rest2);
        float root = sqrtf(v[i] * a->fix2) + a->eps;
        p[i] = fmaf(-a->lr, (m[i] * a->fix1) / root, p[i] * a->decay);
        g[i] = 0;
    }
}

/* ---- vectors ---- */

#if V_SIMD
/* The same operations in the same order as their twins; differences are in how the tail of a row is
 * filled, chosen so that it takes no part: 0 in sums, -inf in maxima, 1 under a logarithm. */
#define K_FN RLHF_TARGET static

K_FN void k_v_exp(int n, const float *x, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(y + i, n - i, v16_exp(v16_get(x + i, n - i, 0)));
}

K_FN void k_v_log(int n, const float *x, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(y + i, n - i, v16_log(v16_get(x + i, n - i, 1)));
}

K_FN void k_v_tanh(int n, const float *x, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(y + i, n - i, v16_tanh(v16_get(x + i, n - i, 0)));
}

K_FN void k_v_sincos(int n, const float *x, float *s, float *c) {
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 a, b;
        v16_sincos(v16_get(x + i, n - i, 0), &a, &b);
        v16_put(s + i, n - i, a);
        v16_put(c + i, n - i, b);
    }
}

K_FN void k_v_add(int n, const float *x, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(y + i, n - i, v16_add(v16_get(y + i, n - i, 0), v16_get(x + i, n - i, 0)));
}

K_FN float k_v_dot(int n, const float *a, const float *b) {
    v16 acc = v16_set(0);
    for (int i = 0; i < n; i += RLHF_LANES)
        acc = v16_fma(v16_get(a + i, n - i, 0), v16_get(b + i, n - i, 0), acc);
    return v16_sum(acc);
}

K_FN void k_v_rms(int n, const float *x, const float *w, float base, float eps, float *y,
                  float *rstd) {
    float r = 1.0f / sqrtf(k_v_dot(n, x, x) / (float)n + eps);
    v16 vr = v16_set(r), vb = v16_set(base);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 g = v16_add(v16_get(w + i, n - i, 0), vb);
        v16_put(y + i, n - i, v16_mul(v16_mul(v16_get(x + i, n - i, 0), vr), g));
    }
    *rstd = r;
}

K_FN void k_v_rms_bwd(int n, const float *dy, const float *x, const float *w, float base,
                      float rstd, float *dx) {
    v16 acc = v16_set(0), vb = v16_set(base);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 g = v16_mul(v16_get(dy + i, n - i, 0), v16_add(v16_get(w + i, n - i, 0), vb));
        acc = v16_fma(g, v16_get(x + i, n - i, 0), acc);
    }
    float c = -(v16_sum(acc) / (float)n) * rstd * rstd * rstd;
    v16 vc = v16_set(c), vr = v16_set(rstd);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 g = v16_mul(v16_get(dy + i, n - i, 0), v16_add(v16_get(w + i, n - i, 0), vb));
        v16 t = v16_fma(v16_get(x + i, n - i, 0), vc, v16_mul(g, vr));
        v16_put(dx + i, n - i, v16_add(v16_get(dx + i, n - i, 0), t));
    }
}

K_FN void k_v_ln(int n, const float *x, const float *w, const float *b, float eps, float *y,
                 float *mean, float *rstd) {
    v16 acc = v16_set(0), sq = v16_set(0);
    for (int i = 0; i < n; i += RLHF_LANES) acc = v16_add(acc, v16_get(x + i, n - i, 0));
    float m = v16_sum(acc) / (float)n;
    v16 vm = v16_set(m);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 d = v16_keep(v16_sub(v16_get(x + i, n - i, 0), vm), n - i);
        sq = v16_fma(d, d, sq);
    }
    float r = 1.0f / sqrtf(v16_sum(sq) / (float)n + eps);
    v16 vr = v16_set(r);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 xh = v16_mul(v16_sub(v16_get(x + i, n - i, 0), vm), vr);
        v16_put(y + i, n - i, v16_fma(xh, v16_get(w + i, n - i, 0), v16_get(b + i, n - i, 0)));
    }
    *mean = m;
    *rstd = r;
}

K_FN void k_v_ln_bwd(int n, const float *dy, const float *x, const float *w, float mean, float rstd,
                     float *dx) {
    v16 a = v16_set(0), b = v16_set(0), vm = v16_set(mean), vr = v16_set(rstd);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 g = v16_mul(v16_get(dy + i, n - i, 0), v16_get(w + i, n - i, 0));
        a = v16_add(a, g);
        b = v16_fma(g, v16_mul(v16_sub(v16_get(x + i, n - i, 0), vm), vr), b);
    }
    v16 m1 = v16_set(v16_sum(a) / (float)n), m2 = v16_set(v16_sum(b) / (float)n);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 g = v16_mul(v16_get(dy + i, n - i, 0), v16_get(w + i, n - i, 0));
        v16 xh = v16_mul(v16_sub(v16_get(x + i, n - i, 0), vm), vr);
        v16 t = v16_fma(v16_neg(xh), m2, v16_sub(g, m1));
        v16_put(dx + i, n - i, v16_fma(t, vr, v16_get(dx + i, n - i, 0)));
    }
}

K_FN void k_v_norm_dw(int n, const float *dy, const float *x, float mean, float rstd, float *dw) {
    v16 vm = v16_set(mean), vr = v16_set(rstd);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 xh = v16_mul(v16_sub(v16_get(x + i, n - i, 0), vm), vr);
        v16_put(dw + i, n - i, v16_fma(v16_get(dy + i, n - i, 0), xh, v16_get(dw + i, n - i, 0)));
    }
}

/* tanh(a u (1 + b q)), q = u^2. */
V_OP v16 k_v_gelu_tanh(v16 u, v16 q) {
    v16 poly = v16_fma(q, v16_set(K_GELU_B), v16_set(1.0f));
    return v16_tanh(v16_mul(v16_mul(u, v16_set(K_GELU_A)), poly));
}

K_FN void k_v_gelu(int n, const float *x, float *y) {
    v16 half = v16_set(0.5f), one = v16_set(1.0f);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 u = v16_get(x + i, n - i, 0), t = k_v_gelu_tanh(u, v16_mul(u, u));
        v16_put(y + i, n - i, v16_mul(v16_mul(u, half), v16_add(t, one)));
    }
}

K_FN void k_v_gelu_bwd(int n, const float *x, const float *dy, float *dx, float *y) {
    v16 half = v16_set(0.5f), one = v16_set(1.0f);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 u = v16_get(x + i, n - i, 0), q = v16_mul(u, u), t = k_v_gelu_tanh(u, q);
        v16 inner = v16_mul(v16_fma(q, v16_set(3.0f * K_GELU_B), one), v16_set(K_GELU_A));
        v16 sech2 = v16_fma(v16_neg(t), t, one);
        v16 p = v16_add(t, one), x2 = v16_mul(u, half);
        v16 d = v16_fma(v16_mul(x2, sech2), inner, v16_mul(p, half));
        v16_put(dx + i, n - i, v16_mul(d, v16_get(dy + i, n - i, 0)));
        v16_put(y + i, n - i, v16_mul(x2, p));
    }
}

K_FN void k_v_erf(int n, const float *x, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(y + i, n - i, v16_erf(v16_get(x + i, n - i, 0)));
}

K_FN void k_v_gelu_erf(int n, const float *x, float *y) {
    v16 half = v16_set(0.5f), one = v16_set(1.0f), root = v16_set(K_ROOT_HALF);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 u = v16_get(x + i, n - i, 0), e = v16_erf(v16_mul(u, root));
        v16_put(y + i, n - i, v16_mul(v16_mul(u, half), v16_add(e, one)));
    }
}

K_FN void k_v_gelu_erf_bwd(int n, const float *x, const float *dy, float *dx, float *y) {
    v16 half = v16_set(0.5f), one = v16_set(1.0f), root = v16_set(K_ROOT_HALF);
    v16 normal = v16_set(K_NORMAL), minus = v16_set(-0.5f);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 u = v16_get(x + i, n - i, 0), e = v16_exp(v16_mul(v16_mul(u, minus), u));
        v16 p = v16_add(v16_erf(v16_mul(u, root)), one);
        v16 d = v16_fma(v16_mul(u, normal), e, v16_mul(p, half));
        v16_put(dx + i, n - i, v16_mul(d, v16_get(dy + i, n - i, 0)));
        v16_put(y + i, n - i, v16_mul(v16_mul(u, half), p));
    }
}

V_OP v16 k_v_sigmoid(v16 x) {
    v16 one = v16_set(1.0f);
    return v16_div(one, v16_add(one, v16_exp(v16_neg(x))));
}

K_FN void k_v_glu(int n, const float *gate, const float *up, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 g = v16_get(gate + i, n - i, 0);
        v16 silu = v16_mul(g, k_v_sigmoid(g));
        v16_put(y + i, n - i, v16_mul(silu, v16_get(up + i, n - i, 0)));
    }
}

K_FN void k_v_glu_bwd(int n, const float *gate, const float *up, const float *dy, float *dgate,
                      float *dup, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 g = v16_get(gate + i, n - i, 0), d = v16_get(dy + i, n - i, 0);
        v16 s = k_v_sigmoid(g), silu = v16_mul(g, s), u = v16_get(up + i, n - i, 0);
        v16_put(dup + i, n - i, v16_mul(d, silu));
        v16 slope = v16_add(v16_fma(v16_neg(silu), s, silu), s);
        v16_put(dgate + i, n - i, v16_mul(v16_mul(d, u), slope));
        v16_put(y + i, n - i, v16_mul(silu, u));
    }
}

K_FN void k_v_geglu(int n, const float *gate, const float *up, float *y) {
    v16 half = v16_set(0.5f), one = v16_set(1.0f);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 u = v16_get(gate + i, n - i, 0), t = k_v_gelu_tanh(u, v16_mul(u, u));
        v16 gelu = v16_mul(v16_mul(u, half), v16_add(t, one));
        v16_put(y + i, n - i, v16_mul(gelu, v16_get(up + i, n - i, 0)));
    }
}

K_FN void k_v_geglu_bwd(int n, const float *gate, const float *up, const float *dy, float *dgate,
                        float *dup, float *y) {
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(dgate + i, n - i, v16_mul(v16_get(dy + i, n - i, 0), v16_get(up + i, n - i, 0)));
    k_v_gelu_bwd(n, gate, dgate, dgate, y);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 gelu = v16_get(y + i, n - i, 0);
        v16_put(dup + i, n - i, v16_mul(gelu, v16_get(dy + i, n - i, 0)));
        v16_put(y + i, n - i, v16_mul(gelu, v16_get(up + i, n - i, 0)));
    }
}

K_FN void k_v_cap(int n, float *x, float in, float out) {
    v16 a = v16_set(in), b = v16_set(out);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 t = v16_tanh(v16_mul(v16_get(x + i, n - i, 0), a));
        v16_put(x + i, n - i, v16_mul(t, b));
    }
}

K_FN void k_v_cap_bwd(int n, const float *y, float in, float *d) {
    v16 a = v16_set(in), one = v16_set(1.0f);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 t = v16_mul(v16_get(y + i, n - i, 0), a), slope = v16_fma(v16_neg(t), t, one);
        v16_put(d + i, n - i, v16_mul(v16_get(d + i, n - i, 0), slope));
    }
}

K_FN void k_v_rope(int half, float *x, const float *c, const float *s, float sign) {
    v16 vs = v16_set(sign);
    for (int i = 0; i < half; i += RLHF_LANES) {
        int w = half - i;
        v16 a = v16_get(x + i, w, 0), b = v16_get(x + half + i, w, 0), vc = v16_get(c + i, w, 0);
        v16 t = v16_mul(v16_get(s + i, w, 0), vs);
        v16_put(x + i, w, v16_fma(v16_neg(b), t, v16_mul(a, vc)));
        v16_put(x + half + i, w, v16_fma(a, t, v16_mul(b, vc)));
    }
}

K_FN k_stats k_v_stats(int n, const float *x, float scale) {
    v16 vs = v16_set(scale), vm = v16_set(-INFINITY), e = v16_set(0), t = v16_set(0);
    for (int i = 0; i < n; i += RLHF_LANES)
        vm = v16_max(v16_mul(v16_get(x + i, n - i, -INFINITY), vs), vm);
    float m = v16_top(vm);
    vm = v16_set(m);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 d = v16_sub(v16_mul(v16_get(x + i, n - i, 0), vs), vm);
        v16 p = v16_keep(v16_exp(d), n - i);
        e = v16_add(e, p);
        t = v16_fma(p, d, t);
    }
    float sum = v16_sum(e), log_sum = v_log1(sum);
    return (k_stats){m, m + log_sum, log_sum - v16_sum(t) / sum};
}

K_FN void k_v_ce(int n, float *x, float scale, float lse, float coef) {
    v16 vs = v16_set(scale), vl = v16_set(lse), vc = v16_set(coef);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 z = v16_sub(v16_mul(v16_get(x + i, n - i, 0), vs), vl);
        v16_put(x + i, n - i, v16_mul(v16_exp(z), vc));
    }
}

K_FN double k_v_kl(int n, const float *p, const float *q, float scale, float lse_p, float lse_q) {
    v16 vs = v16_set(scale), vp = v16_set(lse_p), vq = v16_set(lse_q), t = v16_set(0);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 lp = v16_sub(v16_mul(v16_get(p + i, n - i, 0), vs), vp);
        v16 lq = v16_sub(v16_mul(v16_get(q + i, n - i, 0), vs), vq);
        t = v16_fma(v16_keep(v16_exp(lp), n - i), v16_sub(lp, lq), t);
    }
    return (double)v16_sum(t);
}

K_FN float k_v_softmax(int n, float *s, float scale, float *max, float *sum) {
    v16 vs = v16_set(scale), vm = v16_set(*max), e = v16_set(0);
    for (int i = 0; i < n; i += RLHF_LANES)
        vm = v16_max(v16_mul(v16_get(s + i, n - i, -INFINITY), vs), vm);
    float m = v16_top(vm), fix = v_exp1(*max - m);
    vm = v16_set(m);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 p = v16_exp(v16_sub(v16_mul(v16_get(s + i, n - i, 0), vs), vm));
        v16_put(s + i, n - i, p);
        e = v16_add(e, v16_keep(p, n - i));
    }
    *max = m;
    *sum = fmaf(*sum, fix, v16_sum(e));
    return fix;
}

K_FN void k_v_prob(int n, float *s, float scale, float lse) {
    v16 vs = v16_set(scale), vl = v16_set(lse);
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(s + i, n - i, v16_exp(v16_sub(v16_mul(v16_get(s + i, n - i, 0), vs), vl)));
}

K_FN void k_v_ds(int n, const float *p, float *dp, float d, float scale) {
    v16 vd = v16_set(d), vs = v16_set(scale);
    for (int i = 0; i < n; i += RLHF_LANES) {
        v16 t = v16_sub(v16_get(dp + i, n - i, 0), vd);
        v16_put(dp + i, n - i, v16_mul(v16_mul(v16_get(p + i, n - i, 0), t), vs));
    }
}

K_FN void k_v_scale(int n, float *x, float a) {
    v16 va = v16_set(a);
    for (int i = 0; i < n; i += RLHF_LANES)
        v16_put(x + i, n - i, v16_mul(v16_get(x + i, n - i, 0), va));
}

K_FN void k_v_panel(int n, const float *x, size_t ld, float *y) {
    int whole = n / V_WIDTH * V_WIDTH;
    for (int i = 0; i < whole; i += V_WIDTH)
        for (int row = 0; row < RLHF_LANES; row += V_WIDTH) {
            vf r[V_WIDTH];
            v_columns(x + (size_t)row * ld + i, ld, r);
            V_UNROLL
            for (int j = 0; j < V_WIDTH; j++) v_store(y + (size_t)(i + j) * RLHF_LANES + row, r[j]);
        }
    k_panel_part(RLHF_LANES, n - whole, x + whole, 1, ld, y + (size_t)whole * RLHF_LANES);
}

K_FN void k_v_half(int n, const float *x, size_t step, uint16_t *y) {
    for (int at = 0; at < n; at += RLHF_LANES) {
        v16 v = v16_get(x + at, n - at, 0);
        uint16_t *out = y + (size_t)(at / 32) * step + at % 32;
        V_EACH(v_store_upper(out + i * V_WIDTH, vi_half(v.r[i])));
    }
}

K_FN void k_v_wide(int n, const uint16_t *x, float *y) {
    int i = 0;
    for (; i + V_WIDTH <= n; i += V_WIDTH) v_store(y + i, v_widen(x + i));
    k_r_wide(n - i, x + i, y + i);
}

K_FN void k_v_pairs(int n, int pairs, int strips, int w, const float *x, size_t ld, float *y) {
    if (w % V_WIDTH) {
        k_r_pairs(n, pairs, strips, w, x, ld, y);
        return;
    }
    vi low = vi_set(0xffff);
    for (int p = 0; p < n / 2; p++, x += 2 * ld) {
        for (int c = 0; c < strips * w; c += RLHF_LANES) {
            __builtin_prefetch(x + K_ROWS_AHEAD * ld + c);
            __builtin_prefetch(x + (K_ROWS_AHEAD + 1) * ld + c);
        }
        for (int s = 0; s < strips; s++)
            for (int c = 0; c < w; c += V_WIDTH) {
                vi a = vi_half(v_load(x + s * w + c)), b = vi_half(v_load(x + ld + s * w + c));
                a = vi_add(vi_and(vi_shr(a, 16), low), b);
                v_store(y + ((size_t)s * (size_t)pairs + (size_t)p) * (size_t)w + c, v_of(a));
            }
    }
    /* A last row without a partner, and the zeros behind it. */
    for (int s = 0; s < strips && n / 2 < pairs; s++)
        k_pairs_part(n % 2, pairs - n / 2, w, x + s * w, ld,
                     y + ((size_t)s * (size_t)pairs + (size_t)(n / 2)) * (size_t)w, (size_t)w);
}

/* The compiler's own vectors: 06 has none of doubles. */
typedef float k_f4 __attribute__((vector_size(16)));
typedef double k_d4 __attribute__((vector_size(32)));

K_FN double k_v_sumsq(int64_t n, const float *x) {
    k_d4 acc[RLHF_LANES / 4] = {{0}};
    int64_t i = 0;
    for (; i + RLHF_LANES <= n; i += RLHF_LANES)
        for (int l = 0; l < RLHF_LANES / 4; l++) {
            k_f4 f;
            memcpy(&f, x + i + 4 * l, sizeof f);
            k_d4 d = __builtin_convertvector(f, k_d4);
            acc[l] += d * d;
        }
    double lane[RLHF_LANES];
    memcpy(lane, acc, sizeof lane);
    for (int l = 0; i + l < n; l++) lane[l] += (double)x[i + l] * (double)x[i + l];
    for (int w = RLHF_LANES / 2; w > 0; w /= 2)
        for (int l = 0; l < w; l++) lane[l] += lane[l + w];
    return lane[0];
}

K_FN void k_v_adam(int64_t n, float *p, float *g, float *m, float *v, const k_adam *a) {
    v16 b1 = v16_set(a->beta1), b2 = v16_set(a->beta2), clip = v16_set(a->clip);
    v16 c1 = v16_set(a->rest1), c2 = v16_set(a->rest2), eps = v16_set(a->eps);
    v16 f1 = v16_set(a->fix1), f2 = v16_set(a->fix2), lr = v16_set(-a->lr), dc = v16_set(a->decay);
    for (int64_t i = 0; i < n; i += RLHF_LANES) {
        int w = n - i < RLHF_LANES ? (int)(n - i) : RLHF_LANES;
        v16 u = v16_mul(v16_get(g + i, w, 0), clip);
        v16 m1 = v16_fma(v16_get(m + i, w, 0), b1, v16_mul(u, c1));
        v16 v1 = v16_fma(v16_get(v + i, w, 0), b2, v16_mul(v16_mul(u, u), c2));
        v16 root = v16_add(v16_sqrt(v16_mul(v1, f2)), eps);
        v16_put(m + i, w, m1);
        v16_put(v + i, w, v1);
        v16 step = v16_div(v16_mul(m1, f1), root);
        v16_put(p + i, w, v16_fma(lr, step, v16_mul(v16_get(p + i, w, 0), dc)));
        v16_put(g + i, w, v16_set(0));
    }
}
#endif

/* ---- neither: plain C that memory bounds ---- */

RLHF_INLINE void k_strips_of(const int w, int n, int strips, const float *x, size_t ld, float *y) {
    size_t strip = (size_t)n * (size_t)w;
    for (int i = 0; i < n; i++, x += ld, y += w) {
        for (int c = 0; c < strips * w; c += RLHF_LANES)
            __builtin_prefetch(x + K_ROWS_AHEAD * ld + c);
        for (int s = 0; s < strips; s++)
            memcpy(y + (size_t)s * strip, x + s * w, (size_t)w * sizeof *y);
    }
}

/* n rows of strips * w numbers, ld apart, cut into strips y[strips][n][w], side by side: each row
 * is read as it lies. The widths of tiles and panels are constants. */
static void k_strips(int n, int strips, int w, const float *x, size_t ld, float *y) {
    if (w == 6) k_strips_of(6, n, strips, x, ld, y);
    else if (w == 8) k_strips_of(8, n, strips, x, ld, y);
    else if (w == RLHF_LANES) k_strips_of(RLHF_LANES, n, strips, x, ld, y);
    else k_strips_of(w, n, strips, x, ld, y);
}

/* Index of a draw from softmax(x scale) whose log normaliser is lse: the first i with sum_{j<=i}
 * p_j > u, u uniform in [0, 1). The sum is in double and in order of ids, so that the draw is a
 * function of the logits' bits and u alone. Tokens of probability 0 are never drawn. */
static int k_draw(const k_table *k, int n, const float *x, float scale, float lse, double u) {
    double sum = 0;
    int last = 0;
    /* In pieces, so that most draws stop after a part of the vocabulary. */
    for (int i = 0; i < n; i += 256) {
        float p[256];
        int w = n - i < 256 ? n - i : 256;
        memcpy(p, x + i, (size_t)w * sizeof *p);
        k->ce(w, p, scale, lse, 1.0f);
        for (int j = 0; j < w; j++) {
            if (p[j] <= 0) continue;
            sum += (double)p[j];
            last = i + j;
            if (sum > u) return last;
        }
    }
    return last; /* rounding left the total just under u */
}

/* ============================================================================================
 * MARK: - 08 GEMM (gemm_)
 * C[m][n] = sum_k A[m][k] B[k][n], the only place that knows about packing, tiles and cache blocks.
 * A tile keeps its outputs in registers over k, in order, with fused multiply-adds: every output is
 * the same chain for any tile, block, thread or instruction set. B is read in panels: sixteen
 * columns wide, k after k, padded with zeros. A is read in place through two strides, so every
 * transpose is one driver. An edge in n goes through a stack tile, an edge in m has a tile of its
 * height.
 *
 * Blocks are those of Goto and van de Geijn (2008), "Anatomy of high-performance matrix
 * multiplication": a block of A fills half of the second-level cache, and each thread packs the
 * panels of B that it is about to use, so that no packed copy passes through memory. Where the sum
 * is cut, C carries the chain from one part of k to the next: a float in memory is the float in the
 * register, and no bit depends on the cut. Panels that many products of few rows share (decoding)
 * are packed once, by gemm_pack.
 *
 * A product may be of bfloat16 numbers (`half`): both operands are rounded where they are packed,
 * sums stay in single precision. Two neighbours along k make one 32-bit element, a pair, and
 * everything above holds for pairs. How a pair is added is the instruction set's: its bits are the
 * same for any threads and batch, but not on another machine.
 *
 * Entry: gemm_run (threads), gemm_block (one thread).   Tests: test/test_gemm.c
 * Bench: rlhf bench gemm
 * ============================================================================================ */

enum {
    GEMM_STORE = 0,
    GEMM_ACC = 1, /* the chain starts at C: C + a0 b0 + a1 b1 ... */
    GEMM_MAX_ROWS = 32,
    GEMM_SUMS = 8, /* rows of a tile that keeps its sums in vector registers */
    GEMM_MAX_PANELS = 6,
    GEMM_BLOCK = 256, /* elements of a square of pairs */
    GEMM_DEPTH = 1024 /* longest part of k that a block of A and a group of panels have */
};

/* One tile's operands; all strides count floats. The driver sets a, b, c and bias to the tile's
 * corner, the caller of the driver to the product's. */
typedef struct gemm_tile_args {
    int k; /* length of every sum, in pairs where the product is of bfloat16 */
    const float *a;
    size_t rs, cs;     /* A element (m, k) is a[m * rs + k * cs] */
    const float *b;    /* panels of B, each [k][16]; null: packed on the way (gemm_args.src) */
    size_t bs;         /* floats from one panel to the next */
    const float *next; /* what comes next, for each step of k to ask for a line of it; or null */
    size_t step;       /* floats from one such line to the next; 0: nothing to ask for */
    float *c;          /* [rows][ldc], overwritten or added to as mode says */
    size_t ldc;
    int mode;          /* GEMM_STORE or GEMM_ACC */
    const float *bias; /* added after the sum; null = none */
    const float *add;  /* [rows][ldc], added after that, a residual connection; may be c; or null */
} gemm_tile_args;

/* A whole product, its epilogue and its size. */
typedef struct gemm_args {
    int m, n; /* rows and columns of C */
    gemm_tile_args t;
    int half;         /* of bfloat16; t.b, if not null, is panels of pairs */
    const float *src; /* B element (k, n) is src[k * ks + n * ns], where t.b is null */
    size_t ks, ns;    /* one of them is 1 */
    size_t ms;        /* floats of A for each row from one tile to the next; 0: t.rs */
    k_map_fn *act;    /* y = act(c), row by row while the block is in cache; null = none */
    float *y;         /* [m][ldy] */
    size_t ldy;
} gemm_args;

/* ---- tiles ---- */

/* The plain-C tile, and what defines a tile of `rows` rows and `panels` panels: one fmaf chain for
 * each output, from 0 or C, then the bias, then `add`. Writes sixteen columns a panel. */
static void gemm_r_tile(int rows, int panels, const gemm_tile_args *t) {
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int l = 0; l < RLHF_LANES; l++) {
                const float *a = t->a + (size_t)r * t->rs, *b = t->b + (size_t)p * t->bs + l;
                float *c = t->c + (size_t)r * t->ldc + p * RLHF_LANES + l;
                float sum = t->mode == GEMM_ACC ? *c : 0;
                for (int k = 0; k < t->k; k++)
                    sum = fmaf(a[(size_t)k * t->cs], b[(size_t)k * RLHF_LANES], sum);
                if (t->bias) sum += t->bias[p * RLHF_LANES + l];
                *c = t->add ? t->add[(size_t)r * t->ldc + (size_t)(p * RLHF_LANES + l)] + sum : sum;
            }
}

/* The numbers of a pair. */
RLHF_INLINE float gemm_low(float pair) { return v_bits1((int32_t)((uint32_t)v_int1(pair) << 16)); }
RLHF_INLINE float gemm_high(float pair) {
    return v_bits1((int32_t)((uint32_t)v_int1(pair) & 0xffff0000u));
}

/* The same for pairs, where the processor knows none: two steps of the chain. */
static void gemm_r_pair_tile(int rows, int panels, const gemm_tile_args *t) {
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int l = 0; l < RLHF_LANES; l++) {
                const float *a = t->a + (size_t)r * t->rs, *b = t->b + (size_t)p * t->bs + l;
                size_t at = (size_t)r * t->ldc + (size_t)(p * RLHF_LANES + l);
                float sum = t->mode == GEMM_ACC ? t->c[at] : 0;
                for (int k = 0; k < t->k; k++) {
                    float x = a[(size_t)k * t->cs], y = b[(size_t)k * RLHF_LANES];
                    sum = fmaf(gemm_low(x), gemm_low(y), sum);
                    sum = fmaf(gemm_high(x), gemm_high(y), sum);
                }
                if (t->bias) sum += t->bias[p * RLHF_LANES + l];
                t->c[at] = t->add ? t->add[at] + sum : sum;
            }
}

#if V_SIMD
/* Panels that a low tile reads faster than they are needed come from memory: each step asks for
 * what will be read this many steps later, at last of the panels that follow. */
enum { GEMM_AHEAD = 40 };

/* R rows by P panels; both are constants at every call, so that sum stays in registers: R P <= 6
 * v16 are twelve of AVX2's sixteen registers. What does not fit beside them is read by the fused
 * multiply-add itself. half and ask, constants too: pairs, as in gemm_r_pair_tile; whether a tile
 * that is not low asks for what is to come. */
V_OP void gemm_v_body(const int R, const int P, const int half, const int ask,
                      const gemm_tile_args *t) {
    v16 sum[6][4];
    V_UNROLL
    for (int r = 0; r < R; r++) {
        V_UNROLL
        for (int p = 0; p < P; p++)
            sum[r][p] = t->mode == GEMM_ACC ? v16_load(t->c + (size_t)r * t->ldc + p * RLHF_LANES)
                                            : v16_set(0);
    }
    /* The rows below are the next tile's: on their way to the cache while these sums are made. */
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            __builtin_prefetch(t->c + (size_t)(R + r) * t->ldc + p * RLHF_LANES, 1);
    /* One step of k: P loads, R broadcasts, R P fused multiply-adds. */
    const float *a = t->a, *b = t->b, *after = t->next ? t->next : b, *next = after;
    const size_t step = R <= 3 ? RLHF_LANES : t->step;
    if (R <= 3 && t->k > GEMM_AHEAD) next = b + GEMM_AHEAD * RLHF_LANES;
    for (int k = t->k; k > 0; k--) {
        v16 col[4];
        if (R <= 3 && k == GEMM_AHEAD) next = after;
        V_UNROLL
        for (int p = 0; p < P; p++) {
            if (R <= 3) __builtin_prefetch(next + (size_t)p * t->bs);
            col[p] = v16_load(b + (size_t)p * t->bs);
        }
        v16 high[4];
        V_UNROLL
        for (int p = 0; half && p < P; p++) {
            V_EACH(high[p].r[i] = v_and(col[p].r[i], v_of(vi_set((int32_t)0xffff0000))));
            V_EACH(col[p].r[i] = v_of(vi_shl(vi_of(col[p].r[i]), 16)));
        }
        V_UNROLL
        for (int r = 0; r < R; r++) {
            float e = a[(size_t)r * t->rs];
            v16 x = v16_set(half ? gemm_low(e) : e);
            V_UNROLL
            for (int p = 0; p < P; p++) sum[r][p] = v16_fma(x, col[p], sum[r][p]);
            if (half) x = v16_set(gemm_high(e));
            V_UNROLL
            for (int p = 0; half && p < P; p++) sum[r][p] = v16_fma(x, high[p], sum[r][p]);
        }
        if (R > 3 && ask) __builtin_prefetch(next);
        a += t->cs;
        b += RLHF_LANES;
        next += step;
    }
    V_UNROLL
    for (int r = 0; r < R; r++) {
        V_UNROLL
        for (int p = 0; p < P; p++) {
            float *c = t->c + (size_t)r * t->ldc + p * RLHF_LANES;
            v16 s = sum[r][p];
            if (t->bias) s = v16_add(s, v16_load(t->bias + p * RLHF_LANES));
            if (t->add) s = v16_add(v16_load(t->add + (c - t->c)), s);
            v16_store(c, s);
        }
    }
}

/* Every height with every width up to what the k_table's list of panels says. */
#define GEMM_V(R, P)                                                                               \
    case (R)*8 + (P):                                                                              \
        if ((R) > 3 && t->step) gemm_v_body(R, P, GEMM_HALF, 1, t);                                \
        else gemm_v_body(R, P, GEMM_HALF, 0, t);                                                   \
        return;
#define GEMM_HALF 0
K_FN void gemm_v_tile(int rows, int panels, const gemm_tile_args *t) {
    switch (rows * 8 + panels) {
        GEMM_V(6, 1)
        GEMM_V(5, 1)
        GEMM_V(4, 1)
        GEMM_V(3, 1)
        GEMM_V(3, 2)
        GEMM_V(2, 1)
        GEMM_V(2, 2)
        GEMM_V(2, 3)
        GEMM_V(1, 1)
        GEMM_V(1, 2)
        GEMM_V(1, 3)
        GEMM_V(1, 4)
    }
}
#undef GEMM_HALF
#define GEMM_HALF 1
K_FN void gemm_v_pair_tile(int rows, int panels, const gemm_tile_args *t) {
    switch (rows * 8 + panels) {
        GEMM_V(4, 1)
        GEMM_V(3, 1)
        GEMM_V(2, 1)
        GEMM_V(2, 2)
        GEMM_V(1, 1)
        GEMM_V(1, 2)
        GEMM_V(1, 3)
    }
}
#undef GEMM_HALF
#undef GEMM_V

/* Six chains of sixteen lanes: as many registers as a tile has. Every lane begins at a value of its
 * own: a compiler does two equal chains once, and the peak would be twice what there is. */
K_FN double gemm_v_peak(int64_t rounds, float *sink) {
    static const float lane[RLHF_LANES] = {0, .1f, .2f, .3f, .4f, .5f, .6f, .7f,
                                           8, 8.1f, 8.2f, 8.3f, 8.4f, 8.5f, 8.6f, 8.7f};
    v16 sum[6], x = v16_set(0.999f), y = v16_set(1e-3f);
    V_UNROLL
    for (int j = 0; j < 6; j++) sum[j] = v16_add(v16_load(lane), v16_set((float)j));
    for (int64_t n = 0; n < rounds; n++) {
        V_UNROLL
        for (int j = 0; j < 6; j++) sum[j] = v16_fma(sum[j], x, y);
    }
    V_UNROLL
    for (int j = 0; j < 6; j++) *sink += v16_sum(sum[j]);
    return 2.0 * 6 * RLHF_LANES * (double)rounds;
}
#endif

#if RLHF_X86
/* The attribute allows 512-bit registers in these functions only; row kernels stay at 256 bits. The
 * instructions of bfloat16 are used where `half` asks for them, and nowhere else. */
#define GEMM_512 __attribute__((target("avx512f,avx512bf16,avx2,fma")))

/* The same chains in 512-bit registers: R x P <= 24 sums, P columns of B, one broadcast. */
RLHF_INLINE GEMM_512 void gemm_512_body(const int R, const int P, const int half,
                                        const gemm_tile_args *t) {
    __m512 sum[GEMM_SUMS][GEMM_MAX_PANELS];
    V_UNROLL
    for (int r = 0; r < R; r++) {
        V_UNROLL
        for (int p = 0; p < P; p++)
            sum[r][p] = t->mode == GEMM_ACC
                            ? _mm512_loadu_ps(t->c + (size_t)r * t->ldc + p * RLHF_LANES)
                            : _mm512_setzero_ps();
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            __builtin_prefetch(t->c + (size_t)(R + r) * t->ldc + p * RLHF_LANES, 1);
    /* One step of k, as in gemm_v_body; the blocks are sums, next rows, steps, results. */
    const float *a = t->a, *b = t->b, *next = t->next ? t->next : t->b;
    const size_t step = t->step;
#pragma GCC unroll 4
    for (int k = t->k; k > 0; k--) {
        __m512 col[GEMM_MAX_PANELS];
        V_UNROLL
        for (int p = 0; p < P; p++) {
            if (R <= 4) __builtin_prefetch(b + (size_t)p * t->bs + GEMM_AHEAD * RLHF_LANES);
            col[p] = _mm512_loadu_ps(b + (size_t)p * t->bs);
        }
        V_UNROLL
        for (int r = 0; r < R; r++) {
            __m512 x = _mm512_set1_ps(a[(size_t)r * t->rs]);
            V_UNROLL
            for (int p = 0; p < P; p++)
                sum[r][p] = half ? _mm512_dpbf16_ps(sum[r][p], (__m512bh)x, (__m512bh)col[p])
                                 : _mm512_fmadd_ps(x, col[p], sum[r][p]);
        }
        if (R > 4) __builtin_prefetch(next);
        a += t->cs;
        b += RLHF_LANES;
        next += step;
    }
    V_UNROLL
    for (int r = 0; r < R; r++) {
        V_UNROLL
        for (int p = 0; p < P; p++) {
            float *c = t->c + (size_t)r * t->ldc + p * RLHF_LANES;
            __m512 s = sum[r][p];
            if (t->bias) s = _mm512_add_ps(s, _mm512_loadu_ps(t->bias + p * RLHF_LANES));
            if (t->add) s = _mm512_add_ps(_mm512_loadu_ps(t->add + (c - t->c)), s);
            _mm512_storeu_ps(c, s);
        }
    }
}

/* Tall tiles are three panels wide, low ones up to six. Eight rows by three panels leave registers
 * for the columns of B and need the fewest loads for a multiply-add. */
#define GEMM_P(R, P)                                                                               \
    case (R)*8 + (P):                                                                              \
        gemm_512_body(R, P, GEMM_HALF, t);                                                         \
        return;
#define GEMM_P3(R) GEMM_P(R, 1) GEMM_P(R, 2) GEMM_P(R, 3)
#define GEMM_P4(R) GEMM_P3(R) GEMM_P(R, 4)
#define GEMM_P6(R) GEMM_P4(R) GEMM_P(R, 5) GEMM_P(R, 6)
#define GEMM_512_SHAPES                                                                            \
    switch (rows * 8 + panels) {                                                                   \
        GEMM_P3(8)                                                                                 \
        GEMM_P3(7)                                                                                 \
        GEMM_P4(6)                                                                                 \
        GEMM_P4(5)                                                                                 \
        GEMM_P6(4)                                                                                 \
        GEMM_P6(3)                                                                                 \
        GEMM_P6(2)                                                                                 \
        GEMM_P6(1)                                                                                 \
    }
#define GEMM_HALF 0
GEMM_512 static void gemm_512_tile(int rows, int panels, const gemm_tile_args *t){GEMM_512_SHAPES}
#undef GEMM_HALF
#define GEMM_HALF 1
GEMM_512
    static void gemm_512_pair_tile(int rows, int panels, const gemm_tile_args *t){GEMM_512_SHAPES}

/* Sixteen chains of a register each. */
RLHF_INLINE GEMM_512 double gemm_512_chains(const int half, int64_t rounds, float *sink) {
    __m512 sum[16], x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(1e-3f);
    V_UNROLL
    for (int j = 0; j < 16; j++) sum[j] = _mm512_set1_ps((float)j);
    for (int64_t n = 0; n < rounds; n++) {
        V_UNROLL
        for (int j = 0; j < 16; j++)
            sum[j] = half ? _mm512_dpbf16_ps(sum[j], (__m512bh)y, (__m512bh)y)
                          : _mm512_fmadd_ps(sum[j], x, y);
    }
    V_UNROLL
    for (int j = 0; j < 16; j++) *sink += _mm512_reduce_add_ps(sum[j]);
    return (half ? 4.0 : 2.0) * 16 * RLHF_LANES * (double)rounds;
}

GEMM_512 static double gemm_512_peak(int64_t rounds, float *sink) {
    return gemm_512_chains(0, rounds, sink);
}

GEMM_512 static double gemm_512_pair_peak(int64_t rounds, float *sink) {
    return gemm_512_chains(1, rounds, sink);
}

/* k_r_half and k_r_pairs with the processor's own conversion, which takes denormals for zero. */
GEMM_512 static void gemm_512_half(int n, const float *x, size_t step, uint16_t *y) {
    for (int i = 0; i < n; i += RLHF_LANES) {
        __mmask16 some = (__mmask16)(n - i < RLHF_LANES ? (1 << (n - i)) - 1 : 0xffff);
        __m256bh h = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + i));
        _mm256_storeu_si256((__m256i *)(void *)(y + (size_t)(i / 32) * step + i % 32), (__m256i)h);
    }
}

GEMM_512 static void gemm_512_pairs(int n, int pairs, int strips, int w, const float *x, size_t ld,
                                    float *y) {
    if (w % 8) {
        k_r_pairs(n, pairs, strips, w, x, ld, y);
        return;
    }
    size_t strip = (size_t)pairs * (size_t)w;
    for (int p = 0; p < pairs; p++, x += 2 * ld)
        for (int c = 0; c < strips * w; c += RLHF_LANES) {
            __mmask16 some = strips * w - c < RLHF_LANES ? 0xff : 0xffff;
            __builtin_prefetch(x + K_ROWS_AHEAD * ld + c);
            __builtin_prefetch(x + (K_ROWS_AHEAD + 1) * ld + c);
            __m512 lo = _mm512_maskz_loadu_ps(2 * p < n ? some : 0, x + c);
            __m512 hi = _mm512_maskz_loadu_ps(2 * p + 1 < n ? some : 0, x + ld + c);
            __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(lo));
            __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(hi));
            a = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
            float *out = y + (size_t)(c / w) * strip + (size_t)(p * w + c % w);
            _mm256_storeu_si256((__m256i *)(void *)out, _mm512_castsi512_si256(a));
            if (some == 0xff) continue;
            int next = c + 8; /* the other half may begin a strip of eight */
            out = y + (size_t)(next / w) * strip + (size_t)(p * w + next % w);
            _mm256_storeu_si256((__m256i *)(void *)out, _mm512_extracti64x4_epi64(a, 1));
        }
}

#define GEMM_AMX __attribute__((target("amx-tile,amx-bf16,avx512f")))

/* Shapes of the tile registers: sums 0 to 3, A 4 and 5, B 6 and 7, all sixteen rows of 64 bytes. */
GEMM_AMX static void gemm_amx_begin(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
}

GEMM_AMX static void gemm_amx_end(void) { _tile_release(); }

GEMM_AMX static double gemm_amx_peak(int64_t rounds, float *sink) {
    (void)sink;
    gemm_amx_begin();
    for (int64_t n = 0; n < rounds; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    gemm_amx_end();
    return 4.0 * 2 * 16 * 16 * 32 * (double)rounds;
}

/* One square of pairs: up to two by two products of sixteen rows and columns. Sixteen rows of A are
 * t->k / 16 squares, one behind the other, and so is a panel of B. */
GEMM_AMX static void gemm_amx_sums(const gemm_tile_args *t, int two_rows, int two_panels) {
    const float *a = t->a, *a2 = a + (size_t)t->k * RLHF_LANES;
    const float *b = t->b, *b2 = b + t->bs;
    for (int k = 0; k < t->k; k += 16) {
        size_t at = (size_t)k * RLHF_LANES;
        _tile_loadd(4, a + at, 64);
        _tile_loadd(6, b + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_panels) {
            _tile_loadd(7, b2 + at, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (!two_rows) continue;
        _tile_loadd(5, a2 + at, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (two_panels) _tile_dpbf16ps(3, 5, 7);
    }
}

/* Up to 32 rows by two panels. Sums begin and end in a stack tile, through which chains that start
 * at C, edges, bias and residual go. Rows of A beyond `rows` are zeros. */
GEMM_AMX static void gemm_amx_tile(int rows, int panels, const gemm_tile_args *t) {
    float sum[4][GEMM_BLOCK]; /* as the registers: [2 * half of the rows + panel] */
    int two_rows = rows > RLHF_LANES, two_panels = panels > 1;
    if (t->mode == GEMM_ACC) {
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < panels; p++)
                _mm512_storeu_ps(sum[r / RLHF_LANES * 2 + p] + r % RLHF_LANES * RLHF_LANES,
                                 _mm512_loadu_ps(t->c + (size_t)r * t->ldc + p * RLHF_LANES));
        _tile_loadd(0, sum[0], 64);
        _tile_loadd(1, sum[1], 64);
        _tile_loadd(2, sum[2], 64);
        _tile_loadd(3, sum[3], 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            __builtin_prefetch(t->c + (size_t)r * t->ldc + p * RLHF_LANES, 1);
    gemm_amx_sums(t, two_rows, two_panels);
    _tile_stored(0, sum[0], 64);
    _tile_stored(1, sum[1], 64);
    _tile_stored(2, sum[2], 64);
    _tile_stored(3, sum[3], 64);
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++) {
            size_t at = (size_t)r * t->ldc + (size_t)(p * RLHF_LANES);
            __m512 s = _mm512_loadu_ps(sum[r / RLHF_LANES * 2 + p] + r % RLHF_LANES * RLHF_LANES);
            if (t->bias) s = _mm512_add_ps(s, _mm512_loadu_ps(t->bias + p * RLHF_LANES));
            if (t->add) s = _mm512_add_ps(_mm512_loadu_ps(t->add + at), s);
            _mm512_storeu_ps(t->c + at, s);
        }
}
#endif

/* ---- tables ---- */

/* Kernel sets by processor, best first. `panels` lists the widest tile for each height, so that
 * gemm_block knows the shapes without asking which set it runs. */
static int gemm_yes(void) { return 1; }

#define GEMM_PLAIN_KERNEL(name, type) .name = k_r_##name,
#define GEMM_VECTOR_KERNEL(name, type) .name = k_v_##name,
#define GEMM_V_SHAPES .rows = 6, .panels = {0, 4, 3, 2, 1, 1, 1}
#define GEMM_V_PAIR_SHAPES .rows = 4, .panels = {0, 3, 2, 1, 1}
#define GEMM_512_LIST .rows = 8, .panels = {0, 6, 6, 6, 6, 4, 4, 3, 3}

static const k_table k_ref = {
    .name = "ref",
    .available = gemm_yes,
    .f32 = {.tile = gemm_r_tile, GEMM_V_SHAPES},
    .bf16 = {.tile = gemm_r_pair_tile, GEMM_V_PAIR_SHAPES, .half = k_r_half, .pairs = k_r_pairs},
    K_KERNELS(GEMM_PLAIN_KERNEL)};

#if RLHF_X86
/* The compiler's run-time test also asks whether the system saves the wide registers. */
static int gemm_has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int gemm_has_avx512(void) { return gemm_has_avx2() && __builtin_cpu_supports("avx512f"); }

static int gemm_has_bf16(void) { return gemm_has_avx512() && __builtin_cpu_supports("avx512bf16"); }

/* Tile registers: the processor's bits (leaf 7, edx 22 and 24), and the system's leave, which a
 * process asks for once and for all its threads. */
static int gemm_has_amx(void) {
#ifdef __linux__
    unsigned a = 0, b = 0, c = 0, d = 0;
    const unsigned need = 1u << 22 | 1u << 24;
    const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return gemm_has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & need) == need &&
           syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return 0;
#endif
}

static const k_table k_avx2 = {
    .name = "avx2",
    .available = gemm_has_avx2,
    .f32 = {.tile = gemm_v_tile, GEMM_V_SHAPES, .peak = gemm_v_peak},
    .bf16 = {.tile = gemm_v_pair_tile, GEMM_V_PAIR_SHAPES, .half = k_v_half, .pairs = k_v_pairs},
    K_KERNELS(GEMM_VECTOR_KERNEL)};
static const k_table k_avx512 = {
    .name = "avx512",
    .available = gemm_has_avx512,
    .f32 = {.tile = gemm_512_tile, GEMM_512_LIST, .peak = gemm_512_peak},
    .bf16 = {.tile = gemm_v_pair_tile, GEMM_V_PAIR_SHAPES, .half = k_v_half, .pairs = k_v_pairs},
    K_KERNELS(GEMM_VECTOR_KERNEL)};
static const k_table k_avx512bf16 = {
    .name = "avx512bf16",
    .available = gemm_has_bf16,
    .f32 = {.tile = gemm_512_tile, GEMM_512_LIST, .peak = gemm_512_peak},
    .bf16 = {.tile = gemm_512_pair_tile,
             GEMM_512_LIST,
             .half = gemm_512_half,
             .pairs = gemm_512_pairs,
             .peak = gemm_512_pair_peak},
    K_KERNELS(GEMM_VECTOR_KERNEL)};
static const k_table k_amx = {.name = "amx",
                              .available = gemm_has_amx,
                              .f32 = {.tile = gemm_512_tile, GEMM_512_LIST, .peak = gemm_512_peak},
                              .bf16 = {.tile = gemm_amx_tile,
                                       .rows = 32,
                                       .panels = {0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2,
                                                  2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2},
                                       .begin = gemm_amx_begin,
                                       .end = gemm_amx_end,
                                       .half = gemm_512_half,
                                       .pairs = gemm_512_pairs,
                                       .peak = gemm_amx_peak},
                              .blocks = 1,
                              K_KERNELS(GEMM_VECTOR_KERNEL)};
static const k_table *const k_tables[] = {&k_amx, &k_avx512bf16, &k_avx512, &k_avx2, &k_ref};
#elif RLHF_NEON
static const k_table k_neon = {
    .name = "neon",
    .available = gemm_yes,
    .f32 = {.tile = gemm_v_tile, GEMM_V_SHAPES, .peak = gemm_v_peak},
    .bf16 = {.tile = gemm_v_pair_tile, GEMM_V_PAIR_SHAPES, .half = k_v_half, .pairs = k_v_pairs},
    K_KERNELS(GEMM_VECTOR_KERNEL)};
static const k_table *const k_tables[] = {&k_neon, &k_ref};
#else
static const k_table *const k_tables[] = {&k_ref};
#endif
enum { K_TABLES = sizeof k_tables / sizeof *k_tables };

/* ---- packing ---- */

/* Panels that n columns take; the last may be partly empty. */
static size_t gemm_panels(int n) { return ((size_t)n + RLHF_LANES - 1) / RLHF_LANES; }

/* Steps of a sum over k: k itself, or pairs, of which tile registers take whole squares. */
static int gemm_steps(const k_table *kt, int half, int k) {
    if (!half) return k;
    return kt->blocks ? (k + 31) / 32 * 16 : (k + 1) / 2;
}

/* Floats of one panel of B[k][n]. */
static size_t gemm_panel_size(const k_table *kt, int half, int k) {
    return (size_t)gemm_steps(kt, half, k) * RLHF_LANES;
}

/* Floats that B[k][n] takes when packed. */
static size_t gemm_packed_size(const k_table *kt, int half, int k, int n) {
    return gemm_panels(n) * gemm_panel_size(kt, half, k);
}

/* What is packed from where. */
typedef struct gemm_pack_args {
    const k_table *kt;
    const float *b;
    size_t ks, ns; /* B element (k, n) is b[k * ks + n * ns]; one of them is 1 */
    int k, n, half;
    float *out;
} gemm_pack_args;

enum { GEMM_GROUP = 8 }; /* panels or tiles packed side by side */

/* Packs panels [lo, hi). A source whose rows are contiguous (ns 1) is copied by rows of sixteen,
 * one whose columns are (ks 1) is transposed. */
static void gemm_pack_plain(const gemm_pack_args *g, int lo, int hi) {
    if (hi == (int)gemm_panels(g->n) && g->n % RLHF_LANES) /* missing columns are zeros */
        memset(g->out + (size_t)(hi - 1) * RLHF_LANES * (size_t)g->k, 0,
               (size_t)g->k * RLHF_LANES * sizeof *g->out);
    int whole = g->ns == 1 ? base_min(hi, g->n / RLHF_LANES) : lo;
    for (int p = lo; p < whole; p += GEMM_GROUP)
        k_strips(g->k, base_min(GEMM_GROUP, whole - p), RLHF_LANES, g->b + p * RLHF_LANES,
                 g->ks, g->out + (size_t)p * RLHF_LANES * (size_t)g->k);
    for (int p = base_max(lo, whole); p < hi; p++) {
        int n0 = p * RLHF_LANES, w = base_min(RLHF_LANES, g->n - n0);
        const float *b = g->b + (size_t)n0 * g->ns;
        float *out = g->out + (size_t)n0 * (size_t)g->k;
        if (w == RLHF_LANES && g->ks == 1) g->kt->panel(g->k, b, g->ns, out);
        else k_panel_part(w, g->k, b, g->ks, g->ns, out);
    }
}

/* One panel of pairs from w <= 16 rows of the source: rounded piece by piece, then transposed, a
 * pair being one element of the transpose. */
static void gemm_pack_pair_panel(const gemm_pack_args *g, const float *b, int w, float *out) {
    enum { PIECE = 256 };
    uint16_t rows[RLHF_LANES * PIECE] __attribute__((aligned(RLHF_ALIGN)));
    int steps = gemm_steps(g->kt, 1, g->k);
    for (int k = 0; k < g->k; k += PIECE) {
        int n = base_min(PIECE, g->k - k);
        if (n < PIECE || w < RLHF_LANES) memset(rows, 0, sizeof rows);
        for (int l = 0; l < w; l++)
            g->kt->bf16.half(n, b + (size_t)l * g->ns + k, 32, rows + l * PIECE);
        g->kt->panel(base_min(PIECE / 2, steps - k / 2), (const float *)(const void *)rows,
                     PIECE / 2, out + (size_t)k / 2 * RLHF_LANES);
    }
}

/* The same for products of bfloat16: panels of pairs. */
static void gemm_pack_half(const gemm_pack_args *g, int lo, int hi) {
    int steps = gemm_steps(g->kt, 1, g->k);
    size_t size = (size_t)steps * RLHF_LANES;
    int whole = g->ns == 1 ? base_min(hi, g->n / RLHF_LANES) : lo;
    for (int p = lo; p < whole; p += GEMM_GROUP)
        g->kt->bf16.pairs(g->k, steps, base_min(GEMM_GROUP, whole - p), RLHF_LANES,
                          g->b + p * RLHF_LANES, g->ks, g->out + (size_t)p * size);
    for (int p = base_max(lo, whole); p < hi; p++) {
        int n0 = p * RLHF_LANES, w = base_min(RLHF_LANES, g->n - n0);
        float *out = g->out + (size_t)p * size;
        if (g->ks == 1) gemm_pack_pair_panel(g, g->b + (size_t)n0 * g->ns, w, out);
        else {
            memset(out, 0, size * sizeof *out);
            k_pairs_part(g->k, steps, w, g->b + n0, g->ks, out, RLHF_LANES);
        }
    }
}

static void gemm_pack_range(void *arg, int64_t lo, int64_t hi, int thread) {
    const gemm_pack_args *g = arg;
    (void)thread;
    if (g->half) gemm_pack_half(g, (int)lo, (int)hi);
    else gemm_pack_plain(g, (int)lo, (int)hi);
}

/* Packs B[k][n] into panels at out[gemm_packed_size(...)], over the context's threads. For W [n][k]
 * as y = x W^T wants it: ks = 1, ns = k. */
static void gemm_pack(rlhf_ctx *ctx, int half, const float *b, size_t ks, size_t ns, int k, int n,
                      float *out) {
    gemm_pack_args g = {ctx->k, b, ks, ns, k, n, half, out};
    int64_t panels = (int64_t)gemm_panels(n);
    par_for(ctx, panels, par_grain((int64_t)RLHF_LANES * k), gemm_pack_range, &g);
}

/* Packs A, whose m rows run fastest (element (m, k) is a[k * ks + m]), into tiles out[m /
 * rows][k][rows], for a gemm_args with t.rs 1, t.cs rows and ms k. Read in place, each step of k
 * would touch another page, and steps of a power of two the same cache set. */
static void gemm_pack_a(const k_table *kt, const float *a, size_t ks, int m, int k, float *out) {
    int rows = kt->f32.rows, tiles = m / rows;
    for (int t = 0; t < tiles; t += GEMM_GROUP)
        k_strips(k, base_min(GEMM_GROUP, tiles - t), rows, a + t * rows, ks,
                 out + (size_t)(t * rows) * (size_t)k);
    /* The last, lower tile keeps the distance of a full one from k to k. */
    for (int i = 0; m % rows && i < k; i++)
        memcpy(out + (size_t)(tiles * rows) * (size_t)k + (size_t)(i * rows),
               a + (size_t)i * ks + tiles * rows, (size_t)(m % rows) * sizeof *out);
}

/* A of a product of bfloat16, as pairs: t's operand becomes out, its k the number of steps; returns
 * what gemm_args.ms is to be. Rows that lie in memory stay rows; columns become tiles
 * [steps][rows].
 */
static size_t gemm_pack_a_pairs(const k_table *kt, gemm_tile_args *t, int m, float *out) {
    int k = t->k, rows = kt->bf16.rows, tiles = m / rows, steps = gemm_steps(kt, 1, k);
    size_t row = base_round_up((size_t)k, RLHF_LANES) / 2, tile = (size_t)(steps * rows);
    if (t->cs == 1) {
        for (int r = 0; r < m; r++)
            kt->bf16.half(k, t->a + (size_t)r * t->rs, 32,
                          (uint16_t *)(void *)(out + (size_t)r * row));
        t->rs = row;
    } else {
        for (int i = 0; i < tiles; i += GEMM_GROUP)
            kt->bf16.pairs(k, steps, base_min(GEMM_GROUP, tiles - i), rows, t->a + i * rows, t->cs,
                           out + (size_t)i * tile);
        k_pairs_part(k, steps, m % rows, t->a + tiles * rows, t->cs, out + (size_t)tiles * tile,
                     (size_t)rows);
        t->rs = 1;
        t->cs = (size_t)rows;
    }
    t->a = out;
    t->k = steps;
    return t->rs == 1 ? (size_t)steps : 0;
}

/* The same for tile registers: sixteen rows are squares [16][16 pairs], one behind the other. */
static size_t gemm_pack_a_squares(const k_table *kt, gemm_tile_args *t, int m, float *out) {
    enum { PIECE = 256 };
    int k = t->k, steps = gemm_steps(kt, 1, k);
    float turn[PIECE / 2 * RLHF_LANES] __attribute__((aligned(RLHF_ALIGN)));
    for (int r0 = 0; r0 < m; r0 += RLHF_LANES) {
        int rows = base_min(RLHF_LANES, m - r0);
        float *to = out + (size_t)r0 * (size_t)steps;
        if (rows < RLHF_LANES || k % 32) memset(to, 0, (size_t)steps * RLHF_LANES * sizeof *to);
        for (int r = 0; t->cs == 1 && r < rows; r++)
            kt->bf16.half(k, t->a + (size_t)(r0 + r) * t->rs, 2 * GEMM_BLOCK,
                          (uint16_t *)(void *)(to + r * RLHF_LANES));
        for (int k0 = 0; t->cs != 1 && k0 < k; k0 += PIECE) {
            const float *a = t->a + (size_t)k0 * t->cs + r0;
            int n = base_min(PIECE, k - k0), pairs = (n + 31) / 32 * 16;
            if (rows == RLHF_LANES) kt->bf16.pairs(n, pairs, 1, RLHF_LANES, a, t->cs, turn);
            else memset(turn, 0, sizeof turn), k_pairs_part(n, pairs, rows, a, t->cs, turn, 16);
            for (int p = 0; p < pairs; p += RLHF_LANES)
                kt->panel(RLHF_LANES, turn + p * RLHF_LANES, RLHF_LANES,
                          to + (size_t)(k0 / 2 + p) * RLHF_LANES);
        }
    }
    t->a = out;
    t->k = steps;
    return (size_t)steps;
}

/* ---- driver ---- */

/* Rows [m0, m1) and panels [p0, p1) of a product, as a product of its own. */
static gemm_args gemm_part(const gemm_args *g, int m0, int m1, int p0, int p1) {
    gemm_args s = *g;
    size_t row = (size_t)m0, col = (size_t)p0 * RLHF_LANES;
    s.m = m1 - m0;
    s.n = base_min(g->n, p1 * RLHF_LANES) - (int)col;
    s.t.a += row * (g->ms ? g->ms : g->t.rs);
    if (s.t.b) s.t.b += (size_t)p0 * g->t.bs;
    else s.src += col * g->ns;
    s.t.c += row * g->t.ldc + col;
    if (s.t.bias) s.t.bias += col;
    if (s.t.add) s.t.add += row * g->t.ldc + col;
    if (s.act) s.y += row * g->ldy + col;
    return s;
}

/* One tile whose last panel is n < 16 columns wide: computed in a full stack tile, from which the
 * valid columns are copied. The sums are the same chains, since the panel is padded with zeros. */
static void gemm_edge(const k_tiles *tiles, int rows, int n, const gemm_tile_args *t) {
    float c[GEMM_MAX_ROWS * RLHF_LANES] = {0}, add[GEMM_MAX_ROWS * RLHF_LANES] = {0};
    float bias[RLHF_LANES] = {0};
    gemm_tile_args e = *t;
    e.c = c;
    e.ldc = RLHF_LANES;
    if (t->bias) e.bias = memcpy(bias, t->bias, (size_t)n * sizeof *bias);
    if (t->add) e.add = add;
    /* What the chain starts from, and what the sum is added to. */
    for (int r = 0; r < rows; r++) {
        if (t->mode == GEMM_ACC)
            memcpy(c + r * RLHF_LANES, t->c + (size_t)r * t->ldc, (size_t)n * sizeof *c);
        if (t->add)
            memcpy(add + r * RLHF_LANES, t->add + (size_t)r * t->ldc, (size_t)n * sizeof *add);
    }
    tiles->tile(rows, 1, &e);
    for (int r = 0; r < rows; r++)
        memcpy(t->c + (size_t)r * t->ldc, c + r * RLHF_LANES, (size_t)n * sizeof *c);
}

/* The first of the equal pieces, of at most `most` each, that `left` is cut into. */
static int gemm_piece(int left, int most) {
    int pieces = (left + most - 1) / most;
    return (left + pieces - 1) / pieces;
}

/* The tiles that a product is made of. */
static const k_tiles *gemm_tiles(const k_table *kt, const gemm_args *g) {
    return g->half ? &kt->bf16 : &kt->f32;
}

/* Tiles one above the other that are few: the panels to come are then needed soon. */
enum { GEMM_FEW_TILES = 8 };

/* The product on the calling thread, B in panels (t.b); then act on what it wrote. Tiles of all
 * rows share their panels while these are near, and are of one height as nearly as they can be: a
 * low one makes less of each load. A that is packed has the height it was packed for. The order of
 * tiles decides what stays in the cache, never a bit of the result. */
static void gemm_block(const k_table *kt, const gemm_args *g) {
    const k_tiles *tiles = gemm_tiles(kt, g);
    int whole = g->n / RLHF_LANES, panels = (int)gemm_panels(g->n);
    int height = g->ms ? tiles->rows : gemm_piece(g->m, tiles->rows);
    size_t ms = g->ms ? g->ms : g->t.rs;
    if (tiles->begin) tiles->begin();
    for (int p = 0, w; p < panels; p += w) {
        w = p < whole ? gemm_piece(whole - p, tiles->panels[base_min(height, g->m)]) : 1;
        gemm_tile_args t = g->t;
        size_t col = (size_t)p * RLHF_LANES;
        t.b += (size_t)p * g->t.bs;
        if (t.bias) t.bias += col;
        /* While these panels are used, each of the next ones is asked for: by `share` tiles, or at
         * once where there are so many that it is there in any case. */
        int high = (g->m + height - 1) / height;
        int share = high > GEMM_FEW_TILES ? 1 : base_max(1, high / w);
        int part = (RLHF_LANES + share - 1) / share;
        for (int m = 0, i = 0, rows; m < g->m; m += rows, i++) {
            size_t row = (size_t)m * g->t.ldc + col;
            rows = g->ms ? base_min(height, g->m - m) : gemm_piece(g->m - m, tiles->rows);
            t.a = g->t.a + (size_t)m * ms;
            t.c = g->t.c + row;
            if (t.add) t.add = g->t.add + row;
            int ahead = p + w + i / share;
            t.step = i / share < w && ahead < panels ? (size_t)part : 0;
            t.next = g->t.b + (size_t)(t.step ? ahead : p) * g->t.bs;
            t.next += (size_t)(i % share * t.k) * t.step;
            /* Rows that are read where they lie come from memory with the first panels: those of
             * the tile below are asked for. */
            if (!p && !t.step && !g->ms && t.cs == 1 && t.rs == (size_t)t.k) {
                t.step = (size_t)rows;
                t.next = t.a + (size_t)rows * t.rs;
            }
            if (p < whole) tiles->tile(rows, w, &t);
            else gemm_edge(tiles, rows, g->n - (int)col, &t);
        }
    }
    if (tiles->end) tiles->end();
    for (int m = 0; g->act && m < g->m; m++)
        g->act(g->n, g->t.c + (size_t)m * g->t.ldc, g->y + (size_t)m * g->ldy);
}

/* The product cut into a grid of blocks for par_for, and the scratch of one thread: rows of A, a
 * group of panels of B, a block of C where the sum is cut and C is not its place. */
typedef struct gemm_job {
    const k_table *kt;
    const gemm_args *g;
    int rows, panels, down; /* size of a block; blocks in one column of blocks */
    int depth;              /* of a part of the sum */
    int high, group;        /* rows of A and panels of B that are packed at a time */
    size_t a, b, c;         /* floats for each; a 0: A is read in place */
    float *scratch;
    int *held; /* per thread: the column of blocks all of whose panels its scratch holds; or -1 */
} gemm_job;

static float *gemm_job_scratch(const gemm_job *j, int thread) {
    return j->scratch + (size_t)thread * (j->a + j->b + j->c);
}

/* Some rows of one part of the sum, whose panels are packed. Packs A where it is to be. */
static void gemm_job_rows(const gemm_job *j, gemm_args *s, float *scratch) {
    const k_table *kt = j->kt;
    if (s->half && kt->blocks) s->ms = gemm_pack_a_squares(kt, &s->t, s->m, scratch);
    else if (s->half) s->ms = gemm_pack_a_pairs(kt, &s->t, s->m, scratch);
    else if (j->a) {
        gemm_pack_a(kt, s->t.a, s->t.cs, s->m, s->t.k, scratch);
        s->t.a = scratch;
        s->t.cs = (size_t)kt->f32.rows;
        s->ms = (size_t)s->t.k;
    }
    gemm_block(kt, s);
}

/* One part of the sum of one block: panels are packed once for all its rows, and for those of the
 * blocks below where they are all that the column needs; rows of A once for a group of panels. */
static void gemm_job_part(const gemm_job *j, const gemm_args *s, int column, int thread) {
    float *scratch = gemm_job_scratch(j, thread);
    int panels = (int)gemm_panels(s->n), whole = panels <= j->group && s->t.k == j->g->t.k;
    for (int p = 0, w; p < panels; p += w) {
        w = gemm_piece(panels - p, j->group);
        gemm_args group = gemm_part(s, 0, s->m, p, p + w);
        if (!s->t.b) {
            gemm_pack_args pack = {j->kt,   group.src, s->ks,   s->ns,
                                   s->t.k,  group.n,   s->half, scratch + j->a};
            if (!whole || j->held[thread] != column) gemm_pack_range(&pack, 0, w, 0);
            j->held[thread] = whole ? column : -1;
            group.t.b = pack.out;
            group.t.bs = gemm_panel_size(j->kt, s->half, s->t.k);
        }
        for (int m = 0; m < s->m; m += j->high) {
            gemm_args rows = gemm_part(&group, m, base_min(m + j->high, s->m), 0, w);
            gemm_job_rows(j, &rows, scratch);
        }
    }
}

/* One block: the parts of its sum in order. C carries the chain, or scratch where C holds what the
 * sum is to be added to. */
static void gemm_job_block(const gemm_job *j, const gemm_args *block, int column, int thread) {
    int k = block->t.k;
    gemm_args part = *block;
    if (j->c) {
        part.t.c = gemm_job_scratch(j, thread) + j->a + j->b;
        part.t.ldc = (size_t)j->panels * RLHF_LANES;
    }
    for (int k0 = 0; k0 == 0 || k0 < k; k0 += j->depth) {
        gemm_args s = part;
        s.t.k = base_min(j->depth, k - k0);
        s.t.a += (size_t)k0 * part.t.cs;
        if (s.t.b) s.t.b += gemm_panel_size(j->kt, s.half, k0);
        else s.src += (size_t)k0 * part.ks;
        /* What follows the sum follows its last part. */
        if (k0) s.t.mode = GEMM_ACC;
        if (k0 + j->depth < k) s.t.bias = NULL;
        if (k0 + j->depth < k || j->c) s.t.add = NULL, s.act = NULL;
        gemm_job_part(j, &s, column, thread);
    }
    for (int m = 0; j->c && m < block->m; m++) {
        float *c = block->t.c + (size_t)m * block->t.ldc;
        j->kt->add(block->n, part.t.c + (size_t)m * part.t.ldc, c);
        if (block->act) block->act(block->n, c, block->y + (size_t)m * block->ldy);
    }
}

/* Blocks [lo, hi) of the grid, counted down its columns: a thread's blocks share their panels. */
static void gemm_job_range(void *arg, int64_t lo, int64_t hi, int thread) {
    const gemm_job *j = arg;
    for (int64_t i = lo; i < hi; i++) {
        int column = (int)(i / j->down), m = (int)(i % j->down) * j->rows, p = column * j->panels;
        gemm_args block = gemm_part(j->g, m, base_min(m + j->rows, j->g->m), p,
                                    base_min(p + j->panels, (int)gemm_panels(j->g->n)));
        gemm_job_block(j, &block, column, thread);
    }
}

/* Multiply-adds of a block that is worth a thread's attention; those that a thread does in the time
 * in which it packs one number; the share of a block for which threads that find no other wait in
 * the end. */
#define GEMM_WORTH 1e6
#define GEMM_PACK 6
#define GEMM_WAIT (1.0 / 16)

/* Cuts the product into a grid of blocks: the one that takes the busiest thread the fewest
 * multiply-adds, what it packs counted in them: rows of A for each block, panels of B too, or once
 * for the blocks of a column. Where both are packed, fewer blocks may pack so much less that more
 * waiting is worth it. Returns their number. */
static int gemm_cut(const rlhf_ctx *ctx, gemm_job *j) {
    const gemm_args *g = j->g;
    const k_tiles *tiles = gemm_tiles(j->kt, g);
    int panels = (int)gemm_panels(g->n), step = tiles->panels[base_min(tiles->rows, g->m)];
    double work = (double)g->m * g->n * g->t.k, best = INFINITY;
    int most = ctx->threads * (int)fmax(1, fmin(PAR_PIECES, work / ctx->threads / GEMM_WORTH));
    int blocks = 1;
    for (int want = most; want == most || (j->a && want >= ctx->threads); want /= 2)
        for (int down = 1; down <= want && (down == 1 || g->m >= 24 * down); down++) {
            int across = base_min((want + down - 1) / down, (panels + step - 1) / step);
            int rows = (int)base_round_up((size_t)((g->m + down - 1) / down), (size_t)tiles->rows);
            int wide = (panels + across - 1) / across;
            if (panels >= 4 * step * across) wide = (wide + step - 1) / step * step;
            int tall = (g->m + rows - 1) / rows, n = tall * ((panels + wide - 1) / wide);
            int own = (n + ctx->threads - 1) / ctx->threads;
            int groups = g->t.b ? 1 : (wide - 1) / j->group + 1;
            int packs = groups == 1 && j->depth >= g->t.k ? (own + tall - 1) / tall : own;
            double cost = own * (double)rows * (wide * RLHF_LANES);
            if (!g->t.b) cost += (double)GEMM_PACK * packs * wide * RLHF_LANES;
            if (j->a) cost += (double)GEMM_PACK * own * groups * rows;
            cost *= 1 + GEMM_WAIT / own;
            if (cost >= best) continue;
            best = cost;
            j->rows = rows;
            j->panels = wide;
            j->down = tall;
            blocks = n;
        }
    return blocks;
}

/* The whole product, over the context's threads; scratch comes from ws. */
static void gemm_run(rlhf_ctx *ctx, arena *ws, const gemm_args *g) {
    if (g->m <= 0 || g->n <= 0) return;
    /* A fork costs more than the work; of few rows, the work is to read B. */
    int k = g->t.k, small = (double)base_max(g->m, 8) * g->n * k < 262144.0;
    gemm_job j = {.kt = ctx->k, .g = g, .rows = g->m, .panels = (int)gemm_panels(g->n), .down = 1};
    int tile = gemm_tiles(j.kt, g)->rows, floats = (int)(ctx->cache / sizeof(float));
    /* Rows of A that share panels fill half of the cache; for few rows B passes but once. */
    int deep = base_max(256, base_min(GEMM_DEPTH, floats / 2 / 96));
    /* A's columns are packed unless there are too few tiles for that to pay; pairs always are. The
     * more columns of B go with them at a time, the less often. */
    j.a = g->half || (g->t.rs == 1 && g->t.cs > 1 && j.panels >= 4);
    if (j.a && !g->half) deep = base_max(256, deep / 2);
    int parts = g->m < 2 * tile ? 1 : base_max(1, (k + deep / 2) / deep);
    j.depth = (int)base_round_up((size_t)base_max(1, (k + parts - 1) / parts), g->half ? 32 : 1);
    j.group = base_max(GEMM_MAX_PANELS, floats / j.depth / RLHF_LANES);
    int blocks = small ? 1 : gemm_cut(ctx, &j), threads = blocks > 1 ? ctx->threads : 1;
    size_t steps = (size_t)(g->half ? j.depth / 2 : j.depth);
    j.high = base_max(floats / 2 / j.depth / tile * tile, 4 * tile);
    j.high = (int)base_round_up((size_t)gemm_piece(j.rows, j.high), (size_t)tile);
    j.group = g->t.b ? j.panels : base_min(j.panels, j.group);
    if (j.a) j.a = (size_t)j.high * steps;
    if (!g->t.b) j.b = (size_t)j.group * RLHF_LANES * steps;
    if (parts > 1 && g->t.add == g->t.c) j.c = (size_t)j.rows * (size_t)j.panels * RLHF_LANES;
    arena_mark mark = arena_save(ws);
    j.scratch = arena_floats(ws, j.a + j.b + j.c, (size_t)threads);
    j.held = arena_alloc(ws, (size_t)threads * sizeof *j.held);
    for (int i = 0; i < threads; i++) j.held[i] = -1;
    if (blocks > 1) par_for(ctx, blocks, 1, gemm_job_range, &j);
    else gemm_job_range(&j, 0, 1, 0);
    arena_restore(ws, mark);
}

/* ============================================================================================
 * MARK: - 09 LINEAR (op_)
 * Forward and backward of every operation, side by side. A batch is a ragged concatenation of
 * sequences: matrices have one row for each token, attention loops over sequences; there is no
 * padding and no mask. Gradients of weights and of the residual stream are added to, other outputs
 * are overwritten. Every sum over rows is one chain in the order of rows, so that micro-batches
 * continue each other's chains.
 *
 * Each operation is a struct of its operands and par_for functions over it: *_rows computes rows
 * [lo, hi), *_cols the columns [lo, hi) of a gradient that sums over rows. In names d is a gradient
 * of the loss by an activation, g one by a weight; rows, heads and hd (head_dim) are counts.
 * Tests: test/test_ops.c (finite differences)
 * ============================================================================================ */

/* What every operation needs: the context for its threads and kernels, memory for its scratch. */
typedef struct op_env {
    rlhf_ctx *ctx;
    arena *ws; /* scratch, given back before an operation returns */
} op_env;

/* Columns for one thread when each costs one operation a row: whole cache lines. */
static int64_t op_col_grain(int rows) {
    return (int64_t)base_round_up((size_t)par_grain(rows), RLHF_LANES);
}

/* ---- norms ---- */

/* Either norm; weight and bias [n], bias null means RMSNorm. The forward pass reads x and writes y,
 * mean and rstd; the backward pass reads dy, x, mean and rstd and adds to dx, gw and gb. With per,
 * a row of x, y, dy and dx is ld floats that begin with per vectors of n, each normed by itself
 * (the heads of a query): rows counts the vectors. */
typedef struct op_norm {
    const k_table *k;
    int n, per;
    size_t ld;
    float eps, base; /* base: k_r_rms */
    const float *w, *b;
    float *gw, *gb;
    const float *x;     /* input [rows][n] */
    float *y;           /* output [rows][n] */
    float *mean, *rstd; /* [rows] */
    const float *dy;    /* [rows][n] */
    float *dx;
    float *sum; /* if not null: sum = add + y, [rows][n]; sum may be add */
    const float *add;
    int rows;
} op_norm;

/* Where vector r begins. */
static size_t op_norm_at(const op_norm *o, size_t r) {
    size_t n = (size_t)o->n, per = (size_t)o->per;
    return per ? r / per * o->ld + r % per * n : r * n;
}

/* Each row by itself; RMSNorm has no mean, and 0 is what the backward pass then takes off. */
static void op_norm_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_norm *o = arg;
    (void)thread;
    for (int64_t r = lo; r < hi; r++) {
        size_t at = op_norm_at(o, (size_t)r);
        const float *x = o->x + at;
        float *y = o->y + at;
        o->mean[r] = 0;
        if (o->b) o->k->ln(o->n, x, o->w, o->b, o->eps, y, o->mean + r, o->rstd + r);
        else o->k->rms(o->n, x, o->w, o->base, o->eps, y, o->rstd + r);
        if (!o->sum) continue;
        memmove(o->sum + at, o->add + at, (size_t)o->n * sizeof *y);
        o->k->add(o->n, y, o->sum + at);
    }
}

/* y = norm(x) by rows (formulas: k_r_ln, k_r_rms). y may be x only where no backward pass
 * follows. */
static void op_norm_fwd(op_env *e, op_norm *o) {
    par_for(e->ctx, o->rows, par_grain(o->n), op_norm_rows, o);
}

/* dx of rows [lo, hi). */
static void op_norm_bwd_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_norm *o = arg;
    (void)thread;
    for (int64_t r = lo; r < hi; r++) {
        size_t at = op_norm_at(o, (size_t)r);
        const float *x = o->x + at, *dy = o->dy + at;
        float *dx = o->dx + at;
        if (o->b) o->k->ln_bwd(o->n, dy, x, o->w, o->mean[r], o->rstd[r], dx);
        else o->k->rms_bwd(o->n, dy, x, o->w, o->base, o->rstd[r], dx);
    }
}

/* Columns [lo, hi) of gw and gb, over all rows in order. */
static void op_norm_bwd_cols(void *arg, int64_t lo, int64_t hi, int thread) {
    op_norm *o = arg;
    int n = (int)(hi - lo);
    (void)thread;
    for (int r = 0; r < o->rows; r++) {
        size_t at = op_norm_at(o, (size_t)r) + (size_t)lo;
        const float *x = o->x + at, *dy = o->dy + at;
        o->k->norm_dw(n, dy, x, o->mean[r], o->rstd[r], o->gw + lo);
        if (o->b) o->k->add(n, dy, o->gb + lo);
    }
}

/* dx += ..., gw += ..., gb += ... from dy, with x, mean and rstd of the forward pass. */
static void op_norm_bwd(op_env *e, op_norm *o) {
    par_for(e->ctx, o->rows, par_grain(o->n), op_norm_bwd_rows, o);
    if (o->gw) par_for(e->ctx, o->n, op_col_grain(o->rows), op_norm_bwd_cols, o);
}

/* ---- linear ---- */

/* A half-precision number, exactly; denormals by value, NaN with its payload. */
static float op_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h >> 15) << 31, e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return v_bits1((int32_t)(sign | 0x7f800000u | m << 13));
    if (e) return v_bits1((int32_t)(sign | (e + 112) << 23 | m << 13));
    float f = (float)m * 0x1p-24f;
    return sign ? -f : f;
}

/* Rows of a matrix W [n][k] as a file has them, read in place: rows [0, rows) of the piece, k =
 * cols each. kind: '4' F32, 'h' F16, 'b' BF16, whose addresses are multiples of their size. */
typedef struct op_piece {
    const unsigned char *data;
    int rows, cols;
    int hd;         /* not 0: the file has query, key and value of one head after another, hd rows
                       each, where W has all queries, all keys, all values */
    int transposed; /* the file has [cols][rows], as GPT-2's Conv1D; then hd is 0 */
    char kind;
} op_piece;

enum { OP_PIECES = 3 }; /* query, key and value are three tensors */

/* Row r of W in the file's order. */
static size_t op_piece_row(const op_piece *p, size_t r) {
    size_t third = (size_t)p->rows / 3, hd = (size_t)p->hd, in = hd ? r % third : 0;
    return hd ? (in / hd * 3 + r / third) * hd + in % hd : r;
}

/* Columns [from, from + n) of row r as floats. */
static void op_piece_read(const k_table *k, const op_piece *p, size_t r, int from, int n,
                          float *out) {
    size_t step = p->transposed ? (size_t)p->rows : 1;
    size_t at = p->transposed ? (size_t)from * step + r
                              : op_piece_row(p, r) * (size_t)p->cols + (size_t)from;
    const uint16_t *h = (const uint16_t *)(const void *)p->data + (p->kind == '4' ? 0 : at);
    const float *f = (const float *)(const void *)p->data + (p->kind == '4' ? at : 0);
    if (p->kind == 'b' && step == 1) k->wide(n, h, out);
    else if (p->kind == '4' && step == 1) memcpy(out, f, (size_t)n * sizeof *out);
    else
        for (size_t i = 0; i < (size_t)n; i++)
            out[i] = p->kind == '4'   ? f[i * step]
                     : p->kind == 'b' ? v_wide1(h[i * step])
                                      : op_half(h[i * step]);
}

/* An adapter (Hu et al. 2021) to rows [from, from + n) of W: y += scale B (A x), A [r][k], B
 * [n][r]. ga and gb are null where it is not trained. */
typedef struct op_lora {
    int from, n, r;
    float scale;
    const float *a, *b;
    float *ga, *gb;
} op_lora;

/* What an adapter does not see of x: element (row, j) is zero with probability p, else divided by 1
 * - p (Srivastava et al. 2014), by the number key[row] + j of the stream (seed, RNG_DROPOUT). */
typedef struct op_drop {
    float p; /* 0: nothing is dropped */
    uint64_t seed;
    const uint64_t *key; /* [rows] */
} op_drop;

/* y = x W^T + b with W [n][k], as PyTorch's Linear holds it, and adapters to it. W is floats w, or
 * pieces of a file one below the other. packed is W^T in panels [gemm_packed_size(k, n)], kept by
 * the model for products of few rows, or null; gw [n][k] and gb [n] are null where nothing is
 * trained. */
typedef struct op_weight {
    int n, k;
    int ld;    /* floats from one row of y or dy to the next; 0: n */
    int half;  /* products of bfloat16 */
    float cap; /* soft cap of the outputs, which op_logits applies; 0: none */
    const float *w, *b, *packed;
    float *gw, *gb;
    op_piece piece[OP_PIECES];
    op_lora lora[OP_PIECES];
    int pieces, loras;
    op_drop drop; /* of the adapters */
} op_weight;

static size_t op_ld(const op_weight *w) { return (size_t)(w->ld ? w->ld : w->n); }

/* Some rows of W in memory: element (at + i, j) is w[i * rs + j * cs], one of them 1. */
typedef struct op_block {
    const float *w;
    int n;
    size_t rs, cs;
} op_block;

/* Rows of a piece that become floats. */
typedef struct op_widen {
    const k_table *k;
    const op_piece *piece;
    int row;
    float *out; /* [rows][cols] */
} op_widen;

static void op_widen_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    const op_widen *o = arg;
    size_t cols = (size_t)o->piece->cols;
    (void)thread;
    for (int64_t i = lo; i < hi; i++)
        op_piece_read(o->k, o->piece, (size_t)(o->row + i), 0, o->piece->cols,
                      o->out + (size_t)i * cols);
}

/* Floats of a block of rows that are widened: near enough to the cores to cost no memory traffic,
 * large enough to be shared among them. */
enum { OP_WIDEN = 1 << 19 };

/* Rows that are widened at a time: whole panels and whole steps of a sum over them. */
static int op_widen_count(int cols) { return base_max(64, OP_WIDEN / cols / 64 * 64); }

/* The block that begins at row `at`: all of W where it is floats, the rest of a piece that can be
 * used as it lies, else some of its rows as floats in ws. */
static op_block op_block_at(op_env *e, const op_weight *w, int at) {
    if (!w->pieces) return (op_block){w->w, w->n, (size_t)w->k, 1};
    const op_piece *p = w->piece;
    while (at >= p->rows) at -= p++->rows;
    if (p->kind == '4' && !p->hd) {
        const float *f = (const float *)(const void *)p->data;
        if (p->transposed) return (op_block){f + at, p->rows - at, 1, (size_t)p->rows};
        return (op_block){f + (size_t)at * (size_t)p->cols, p->rows - at, (size_t)p->cols, 1};
    }
    int n = base_min(op_widen_count(p->cols), p->rows - at);
    op_widen o = {e->ctx->k, p, at, arena_floats(e->ws, (size_t)n, (size_t)p->cols)};
    par_for(e->ctx, n, par_grain(p->cols), op_widen_rows, &o);
    return (op_block){o.out, n, (size_t)p->cols, 1};
}

/* All of W^T in panels (gemm_pack). */
static void op_pack(op_env *e, const op_weight *w, float *out) {
    arena_mark mark = arena_save(e->ws);
    op_block b = op_block_at(e, w, 0);
    if (b.n < w->n) { /* panels may span pieces: W as floats first */
        float *whole = arena_floats(e->ws, (size_t)w->n, (size_t)w->k), *to = whole;
        for (int i = 0; i < w->pieces; i++) {
            op_widen o = {e->ctx->k, w->piece + i, 0, to};
            par_for(e->ctx, w->piece[i].rows, par_grain(w->k), op_widen_rows, &o);
            to += (size_t)w->piece[i].rows * (size_t)w->k;
        }
        b = (op_block){whole, w->n, (size_t)w->k, 1};
    }
    gemm_pack(e->ctx, w->half, b.w, b.cs, b.rs, w->k, w->n, out);
    arena_restore(e->ws, mark);
}

/* y [m][n] (rows ld apart) = or, with mode GEMM_ACC, += x [m][k] W^T for a small W of floats. */
static void op_small(op_env *e, int m, int n, int k, const float *x, const float *w, int mode,
                     float *y, size_t ld) {
    gemm_args g = {.m = m, .n = n, .src = w, .ks = 1, .ns = (size_t)k};
    g.t = (gemm_tile_args){
        .k = k, .a = x, .rs = (size_t)k, .cs = 1, .c = y, .ldc = ld, .mode = mode};
    gemm_run(e->ctx, e->ws, &g);
}

/* Rows [lo, hi) of what adapters see of x, in place. */
typedef struct op_drop_job {
    const op_drop *d;
    int k;
    float *x;
} op_drop_job;

static void op_drop_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    const op_drop_job *o = arg;
    float keep = 1.0f / (1.0f - o->d->p);
    uint64_t bound = (uint64_t)((double)o->d->p * 65536.0);
    (void)thread;
    for (int64_t r = lo; r < hi; r++) {
        float *x = o->x + (size_t)r * (size_t)o->k;
        /* One number decides on four elements, by sixteen bits each. */
        for (int j = 0; j < o->k; j += 4) {
            uint64_t bits = rng_u64(o->d->seed, RNG_DROPOUT, o->d->key[r] + (uint64_t)j);
            for (int i = j; i < base_min(j + 4, o->k); i++, bits >>= 16)
                x[i] = (bits & 65535) < bound ? 0 : x[i] * keep;
        }
    }
}

/* x as the adapters see it: x itself, or a copy in ws with elements dropped. */
static const float *op_dropped(op_env *e, const op_weight *w, int m, const float *x) {
    if (w->drop.p <= 0) return x;
    size_t n = (size_t)m * (size_t)w->k;
    op_drop_job o = {&w->drop, w->k, memcpy(arena_floats(e->ws, n, 1), x, n * sizeof *x)};
    par_for(e->ctx, m, par_grain(4 * w->k), op_drop_rows, &o);
    return o.x;
}

/* scale A x for each row, [m][r] in ws. */
static float *op_lora_inner(op_env *e, const op_weight *w, const op_lora *l, int m,
                            const float *x) {
    float *t = arena_floats(e->ws, (size_t)m, (size_t)l->r);
    op_small(e, m, l->r, w->k, x, l->a, GEMM_STORE, t, (size_t)l->r);
    e->ctx->k->scale(m * l->r, t, l->scale);
    return t;
}

/* z = act(y) by rows, where it cannot be part of the product. */
typedef struct op_act {
    k_map_fn *act;
    int n;
    size_t ld;
    const float *y;
    float *z;
} op_act;

static void op_act_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    const op_act *o = arg;
    (void)thread;
    for (size_t r = (size_t)lo; r < (size_t)hi; r++)
        o->act(o->n, o->y + r * o->ld, o->z + r * o->ld);
}

/* Adds what the adapters add to y = x W^T, then act. */
static void op_lora_fwd(op_env *e, const op_weight *w, int m, const float *x, float *y,
                        k_map_fn *act, float *z) {
    arena_mark mark = arena_save(e->ws);
    const float *seen = op_dropped(e, w, m, x);
    for (const op_lora *l = w->lora; l < w->lora + w->loras; l++) {
        float *t = op_lora_inner(e, w, l, m, seen);
        op_small(e, m, l->n, l->r, t, l->b, GEMM_ACC, y + l->from, op_ld(w));
    }
    op_act o = {act, w->n, op_ld(w), y, z};
    if (act) par_for(e->ctx, m, par_grain(4 * w->n), op_act_rows, &o);
    arena_restore(e->ws, mark);
}

/* y [m][n] = x [m][k] W^T + b, and then add [m][n], a residual connection, unless it is null (it
 * may be y). act, if not null, also writes z [m][n] = act(y). */
static void op_linear(op_env *e, const op_weight *w, int m, const float *x, float *y,
                      const float *add, k_map_fn *act, float *z) {
    int n;
    for (int at = 0; at < w->n; at += n) {
        arena_mark mark = arena_save(e->ws);
        op_block b = {NULL, w->n, 1, 1};
        if (!w->packed) b = op_block_at(e, w, at);
        n = b.n;
        /* A is x as it lies, B is W^T: rows of W are columns of y. */
        gemm_args g = {.m = m, .n = n, .half = w->half, .ldy = op_ld(w)};
        if (act && !w->loras) g.act = act, g.y = z + at;
        g.t = (gemm_tile_args){.k = w->k,
                               .a = x,
                               .rs = (size_t)w->k,
                               .cs = 1,
                               .b = w->packed,
                               .bs = gemm_panel_size(e->ctx->k, w->half, w->k),
                               .c = y + at,
                               .ldc = op_ld(w),
                               .bias = w->b ? w->b + at : NULL,
                               .add = add ? add + at : NULL};
        g.src = b.w, g.ks = b.cs, g.ns = b.rs;
        gemm_run(e->ctx, e->ws, &g);
        arena_restore(e->ws, mark);
    }
    if (w->loras) op_lora_fwd(e, w, m, x, y, act, z);
}

/* Column sums: y [n] += sum over rows of x [rows][n]. */
typedef struct op_cols {
    const k_table *k;
    const float *x;
    float *y;
    int rows, n;
} op_cols;

/* Columns [lo, hi), over all rows in order. */
static void op_cols_range(void *arg, int64_t lo, int64_t hi, int thread) {
    op_cols *o = arg;
    (void)thread;
    for (int r = 0; r < o->rows; r++)
        o->k->add((int)(hi - lo), o->x + (size_t)r * (size_t)o->n + lo, o->y + lo);
}

/* gw [n][k] += dy^T x, over m rows of which those of dy are ld apart: A is dy^T, B is x, and the
 * sum over rows a GEMM_ACC chain that continues what gw holds. */
static void op_outer(op_env *e, int half, int m, int n, int k, const float *dy, size_t ld,
                     const float *x, float *gw) {
    gemm_args g = {.m = n, .n = k, .half = half, .src = x, .ks = (size_t)k, .ns = 1};
    g.t = (gemm_tile_args){
        .k = m, .a = dy, .rs = 1, .cs = ld, .c = gw, .ldc = (size_t)k, .mode = GEMM_ACC};
    gemm_run(e->ctx, e->ws, &g);
}

/* dx [m][k] = or, with mode GEMM_ACC, += dy [m][n] (rows ld apart) W, where W has b's rows: A is dy
 * as it lies, B is W. */
static void op_back(op_env *e, int half, int m, int k, const float *dy, size_t ld,
                    const op_block *b, int mode, float *dx) {
    gemm_args g = {.m = m, .n = k, .half = half, .src = b->w, .ks = b->rs, .ns = b->cs};
    g.t = (gemm_tile_args){
        .k = b->n, .a = dy, .rs = ld, .cs = 1, .c = dx, .ldc = (size_t)k, .mode = mode};
    gemm_run(e->ctx, e->ws, &g);
}

/* The gradient of scale A x, given that of y: scale dy B, [m][r] in ws. */
static float *op_lora_back(op_env *e, const op_weight *w, const op_lora *l, int m,
                           const float *dy) {
    float *t = arena_floats(e->ws, (size_t)m, (size_t)l->r);
    op_block b = {l->b, l->n, (size_t)l->r, 1};
    op_back(e, 0, m, l->r, dy + l->from, op_ld(w), &b, GEMM_STORE, t);
    e->ctx->k->scale(m * l->r, t, l->scale);
    return t;
}

/* Gradients of the weights: gw [n][k] += dy^T x and gb [n] += column sums of dy, over m rows; those
 * of adapters likewise, whose inner product is computed again rather than kept. */
static void op_linear_bwd_w(op_env *e, const op_weight *w, int m, const float *x, const float *dy) {
    if (w->gw) op_outer(e, w->half, m, w->n, w->k, dy, op_ld(w), x, w->gw);
    op_cols o = {e->ctx->k, dy, w->gb, m, (int)op_ld(w)};
    if (w->gw && w->gb) par_for(e->ctx, w->n, op_col_grain(m), op_cols_range, &o);
    if (!w->loras || !w->lora->ga) return;
    arena_mark mark = arena_save(e->ws);
    const float *seen = op_dropped(e, w, m, x);
    for (const op_lora *l = w->lora; l < w->lora + w->loras; l++) {
        float *t = op_lora_inner(e, w, l, m, seen), *dt = op_lora_back(e, w, l, m, dy);
        op_outer(e, 0, m, l->n, l->r, dy + l->from, op_ld(w), t, l->gb);
        op_outer(e, 0, m, l->r, w->k, dt, (size_t)l->r, seen, l->ga);
    }
    arena_restore(e->ws, mark);
}

/* dx [m][k] = dy [m][n] W, overwritten, and what comes through the adapters. Blocks of W's rows
 * continue one chain of sums. */
static void op_linear_bwd_x(op_env *e, const op_weight *w, int m, const float *dy, float *dx) {
    arena_mark mark = arena_save(e->ws);
    int n;
    for (int at = 0; at < w->n; at += n) {
        op_block b = op_block_at(e, w, at);
        n = b.n;
        op_back(e, w->half, m, w->k, dy + at, op_ld(w), &b, at ? GEMM_ACC : GEMM_STORE, dx);
        arena_restore(e->ws, mark);
    }
    /* The mask of the forward pass, applied to what comes back, needs a place of its own. */
    float *part = w->drop.p > 0 && w->loras ? arena_floats(e->ws, (size_t)m, (size_t)w->k) : dx;
    for (const op_lora *l = w->lora; l < w->lora + w->loras; l++) {
        op_block a = {l->a, l->r, (size_t)w->k, 1};
        float *dt = op_lora_back(e, w, l, m, dy);
        op_back(e, 0, m, w->k, dt, (size_t)l->r, &a,
                l == w->lora && part != dx ? GEMM_STORE : GEMM_ACC, part);
    }
    if (part != dx) {
        op_drop_job o = {&w->drop, w->k, part};
        par_for(e->ctx, m, par_grain(4 * w->k), op_drop_rows, &o);
        e->ctx->k->add(m * w->k, part, dx);
    }
    arena_restore(e->ws, mark);
}

/* ============================================================================================
 * MARK: - 10 OPS (op_)
 * The other operations of 09's kind: embedding, activations, attention, and the vocabulary, whose
 * logits are made in chunks and never kept.
 * Tests: test/test_ops.c (finite differences)
 * ============================================================================================ */

/* ---- embedding ---- */

enum { OP_SPARSE = 64 }; /* rows of a block */

/* The gradient of a table, of which only the rows that tokens occurred for take memory: the others
 * are zero. */
typedef struct op_sparse {
    rlhf_ctx *ctx;
    int vocab, d, n; /* rows of the table; floats of a row; rows that are here */
    int *at, *id;    /* [vocab]: a token's row, -1: none; [n]: the row's token */
    float **block;   /* OP_SPARSE rows each, zeros beyond row n; null: not needed so far */
} op_sparse;

static op_sparse *op_sparse_new(rlhf_ctx *ctx, int vocab, int d) {
    op_sparse *s = mem_zalloc(ctx, 1, sizeof *s);
    s->ctx = ctx;
    s->vocab = vocab;
    s->d = d;
    s->at = mem_alloc(ctx, 2 * (size_t)vocab * sizeof *s->at);
    s->id = s->at + vocab;
    memset(s->at, -1, (size_t)vocab * sizeof *s->at);
    s->block = mem_zalloc(ctx, (size_t)vocab / OP_SPARSE + 1, sizeof *s->block);
    return s;
}

/* Bytes of the rows of so many tokens. */
static size_t op_sparse_bytes(size_t tokens, int d) {
    return base_round_up(tokens, OP_SPARSE) * (size_t)d * sizeof(float);
}

static float *op_sparse_row(const op_sparse *s, int i) {
    return s->block[i / OP_SPARSE] + (size_t)(i % OP_SPARSE) * (size_t)s->d;
}

/* Memory for the rows of so many tokens. */
static void op_sparse_reserve(op_sparse *s, int64_t tokens) {
    if (tokens > s->vocab) tokens = s->vocab;
    for (int i = 0; (int64_t)i * OP_SPARSE < tokens; i++)
        if (!s->block[i])
            s->block[i] = mem_settle(mem_zalloc(s->ctx, OP_SPARSE * (size_t)s->d, sizeof(float)));
}

/* Makes sure that a token has a row. */
static void op_sparse_meet(op_sparse *s, int id) {
    if (s->at[id] >= 0) return;
    op_sparse_reserve(s, s->n + 1);
    s->at[id] = s->n;
    s->id[s->n++] = id;
}

/* Makes all of it zero; the memory stays for the next rows. */
static void op_sparse_clear(op_sparse *s) {
    for (int i = 0; i < s->n; i++) {
        s->at[s->id[i]] = -1;
        memset(op_sparse_row(s, i), 0, (size_t)s->d * sizeof(float));
    }
    s->n = 0;
}

/* null is allowed. */
static void op_sparse_free(op_sparse *s) {
    if (!s) return;
    for (int i = 0; i <= s->vocab / OP_SPARSE; i++) mem_free(s->block[i]);
    mem_free(s->block);
    mem_free(s->at);
    mem_free(s);
}

/* x = scale wte[id] + wpe[pos] for each token. */
typedef struct op_embed {
    const k_table *k;
    int rows, d;
    const int32_t *ids, *pos; /* [rows] */
    const op_weight *wte;
    const float *wpe;         /* null: no learned positions */
    float *gwte, *gwpe;       /* as wte and wpe; null: not trained */
    op_sparse *sparse;        /* takes wte's gradient in place of gwte; or null */
    float scale;              /* 0: 1; otherwise wpe is null */
    float *x;                 /* forward: output; backward: its gradient, destroyed */
} op_embed;

/* Rows [lo, hi): a copy, then an addition. */
static void op_embed_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_embed *o = arg;
    (void)thread;
    size_t d = (size_t)o->d;
    for (int64_t r = lo; r < hi; r++) {
        float *x = o->x + (size_t)r * d;
        size_t id = (size_t)o->ids[r];
        if (o->wte->pieces) op_piece_read(o->k, o->wte->piece, id, 0, o->d, x);
        else memcpy(x, o->wte->w + id * d, d * sizeof *x);
        if (o->scale != 0) o->k->scale(o->d, x, o->scale);
        if (o->wpe) o->k->add(o->d, o->wpe + (size_t)o->pos[r] * d, x);
    }
}

/* Overwrites x [rows][d]. ids and pos are within the tables: model_check_run. */
static void op_embed_fwd(op_env *e, op_embed *o) {
    par_for(e->ctx, o->rows, par_grain(o->d), op_embed_rows, o);
}

/* Columns [lo, hi) of both tables' gradients. Rows are scattered in order: a token that occurs
 * twice is the same chain for any number of threads. */
static void op_embed_cols(void *arg, int64_t lo, int64_t hi, int thread) {
    op_embed *o = arg;
    (void)thread;
    size_t d = (size_t)o->d;
    for (int r = 0; r < o->rows; r++) {
        float *dx = o->x + (size_t)r * d + lo;
        if (o->scale != 0) o->k->scale((int)(hi - lo), dx, o->scale);
        float *g = o->sparse ? op_sparse_row(o->sparse, o->sparse->at[o->ids[r]])
                             : o->gwte + (size_t)o->ids[r] * d;
        o->k->add((int)(hi - lo), dx, g + lo);
        if (o->gwpe) o->k->add((int)(hi - lo), dx, o->gwpe + (size_t)o->pos[r] * d + lo);
    }
}

/* gwte[id] += scale dx, gwpe[pos] += dx for each token, where x holds dx. */
static void op_embed_bwd(op_env *e, op_embed *o) {
    for (int r = 0; o->sparse && r < o->rows; r++) op_sparse_meet(o->sparse, o->ids[r]);
    if (o->gwte || o->sparse) par_for(e->ctx, o->d, op_col_grain(o->rows), op_embed_cols, o);
}

/* ---- activations ---- */

/* y = act(gate) up (Shazeer 2020). Gate and up are one product's output, halves of each row. */
typedef struct op_glu {
    k_glu_fn *act; /* the table's glu or geglu, and its backward */
    k_glu_bwd_fn *act_bwd;
    int ff;
    const float *up; /* [rows][2 ff]: gate, then up */
    float *y;        /* [rows][ff]; the backward pass makes it again */
    const float *dy;
    float *dup; /* as up, overwritten */
} op_glu;

/* y, and below dup, of rows [lo, hi) (formulas: k_r_glu, k_r_glu_bwd). */
static void op_glu_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_glu *o = arg;
    (void)thread;
    size_t f = (size_t)o->ff;
    for (size_t r = (size_t)lo; r < (size_t)hi; r++)
        o->act(o->ff, o->up + 2 * r * f, o->up + 2 * r * f + f, o->y + r * f);
}

static void op_glu_bwd_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_glu *o = arg;
    (void)thread;
    size_t f = (size_t)o->ff;
    for (size_t r = (size_t)lo; r < (size_t)hi; r++) {
        const float *up = o->up + 2 * r * f;
        float *d = o->dup + 2 * r * f;
        o->act_bwd(o->ff, up, up + f, o->dy + r * f, d, d + f, o->y + r * f);
    }
}

/* The gradient of an activation in place, and its output again; the forward pass is gemm's act. */
typedef struct op_gelu {
    k_act_bwd_fn *act_bwd; /* the table's gelu_bwd or gelu_erf_bwd */
    int n;
    const float *x; /* [rows][n], before the activation */
    float *d;       /* gradient of the output, becomes that of the input */
    float *y;
} op_gelu;

/* d of rows [lo, hi), in place. */
static void op_gelu_bwd_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_gelu *o = arg;
    (void)thread;
    size_t n = (size_t)o->n;
    for (size_t r = (size_t)lo; r < (size_t)hi; r++)
        o->act_bwd(o->n, o->x + r * n, o->d + r * n, o->d + r * n, o->y + r * n);
}

/* ---- attention ---- */

/* The cut of attention into tiles. Queries are whole tiles of the product; a tile of scores, 12
 * KiB, stays in the first-level cache between the two products. Where keys are cut is where the
 * running maximum may change, hence OP_KEYS decides bits and OP_QUERIES does not. */
enum {
    OP_KEYS = 64,   /* keys in one tile of the online softmax: part of the result's bits */
    OP_QUERIES = 48 /* queries in one tile */
};

/* Keys and values of one layer and sequence, in the panels that the two products want: keys are
 * columns of S = Q K^T, values rows of O = P V.
 *     K: [kv_heads][cap/16][head_dim][16], columns are positions
 *     V: [kv_heads][hd16/16][cap][16], columns are dimensions, hd16 = head_dim rounded up to 16
 * Positions are appended in place, so decoding packs nothing again. */
typedef struct op_kv {
    float *k, *v;
    int cap; /* positions, a multiple of 16 */
} op_kv;

/* Rows [row, row + n) of a batch, which continue a sequence of `past` positions. */
typedef struct op_seq {
    int row, n, past;
    op_kv kv;
} op_seq;

/* Causal attention with grouped queries (Ainslie et al. 2023): query head h uses key/value head h /
 * (heads / kv_heads). A query sees the last `window` positions, its own among them. qkv, o and
 * their gradients have one row for each token. */
typedef struct op_attn {
    const k_table *kt;
    int heads, kv_heads, hd, seqs;
    const op_seq *seq;
    float *qkv;                 /* [rows][(heads + 2 kv_heads) hd], rotated */
    float *o;                   /* [rows][heads hd] */
    float *lse;                 /* [rows][heads]; null where no backward follows */
    const float *dout;          /* [rows][heads hd] */
    float *dqkv;                /* as qkv, overwritten */
    const float *cosine, *sine; /* [positions][rot/2]; null: no rotary positions */
    int rot;                    /* dimensions of a head that are rotated: the first ones */
    int window;                 /* 0: all positions */
    float scale;                /* of scores */
    float cap;                  /* soft cap of scaled scores; 0: none */
    const int32_t *pos;         /* [rows] */
    float sign;                 /* of the rotation */
    int rows;
    float *scratch;
    size_t scratch_size; /* floats for each thread */
} op_attn;

/* Floats of an op_kv's k and v. */
static size_t op_kv_k_size(int kv_heads, int hd, int cap) {
    return (size_t)kv_heads * (size_t)hd * (size_t)cap;
}

/* Its v: rounded up to whole panels of dimensions. */
static size_t op_kv_v_size(int kv_heads, int hd, int cap) {
    return (size_t)kv_heads * gemm_panels(hd) * RLHF_LANES * (size_t)cap;
}

/* Floats in a row of qkv: queries of all heads, then keys, then values. */
static int op_attn_width(const op_attn *a) { return (a->heads + 2 * a->kv_heads) * a->hd; }

/* Queries and keys of rows [lo, hi), which stand first in a row. */
static void op_rope_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_attn *a = arg;
    (void)thread;
    int half = a->rot / 2;
    for (int64_t r = lo; r < hi; r++) {
        const float *c = a->cosine + (size_t)a->pos[r] * (size_t)half;
        const float *s = a->sine + (size_t)a->pos[r] * (size_t)half;
        float *x = a->qkv + r * op_attn_width(a);
        for (int h = 0; h < a->heads + a->kv_heads; h++)
            a->kt->rope(half, x + h * a->hd, c, s, a->sign);
    }
}

/* Rotary positions (Su et al. 2021): rotates queries and keys in place (sign 1), or their gradients
 * back (sign -1, with qkv = dqkv). Values are not rotated. */
static void op_rope(op_env *e, op_attn *a) {
    if (a->cosine) par_for(e->ctx, a->rows, par_grain(op_attn_width(a)), op_rope_rows, a);
}

/* The first key that the query at a position sees. */
static int op_attn_first(const op_attn *a, int pos) {
    return a->window && pos >= a->window ? pos - a->window + 1 : 0;
}

/* What is left for the softmax to multiply scores by: a soft cap takes the scale in. */
static float op_attn_scale(const op_attn *a) { return a->cap != 0 ? 1.0f : a->scale; }

/* Copies one sequence's new keys and values of group g into its panels, behind its past. */
static void op_kv_append(const op_attn *a, const op_seq *s, int g) {
    size_t hd = (size_t)a->hd, cap = (size_t)s->kv.cap, ld = (size_t)op_attn_width(a);
    float *kp = s->kv.k + (size_t)g * hd * cap;
    float *vp = s->kv.v + (size_t)g * gemm_panels(a->hd) * RLHF_LANES * cap;
    const float *k = a->qkv + (size_t)s->row * ld + (size_t)(a->heads + g) * hd;
    const float *v = k + (size_t)a->kv_heads * hd;
    /* K is transposed on the way, by whole panels where they are there. */
    for (int r = 0, n; r < s->n; r += n) {
        int pos = s->past + r, in = pos % RLHF_LANES;
        float *out = kp + (size_t)(pos - in) * hd;
        n = base_min(s->n - r, RLHF_LANES - in);
        if (n == RLHF_LANES) {
            a->kt->panel(a->hd, k + (size_t)r * ld, ld, out);
            continue;
        }
        /* A product reads whole panels of keys: those to come are zeros, and take no part. */
        if (!in) memset(out, 0, hd * RLHF_LANES * sizeof *out);
        for (int i = 0; i < n; i++)
            for (size_t j = 0; j < hd; j++)
                out[j * RLHF_LANES + (size_t)(in + i)] = k[(size_t)(r + i) * ld + j];
    }
    /* V keeps its rows, cut into panels. */
    for (int p = 0; p < a->hd; p += RLHF_LANES, vp += cap * RLHF_LANES)
        for (int r = 0; r < s->n; r++)
            memcpy(vp + (size_t)(s->past + r) * RLHF_LANES, v + (size_t)r * ld + p,
                   (size_t)base_min(RLHF_LANES, a->hd - p) * sizeof *vp);
}

/* Queries [q0, q1) of one sequence and head, into their rows of o; n = q1 - q0 <= OP_QUERIES. For
 * one tile of keys after another:
 *     S = Q K^T                          by GEMM, into scratch [OP_QUERIES][OP_KEYS]
 *     S = cap tanh(S scale / cap)        where there is a soft cap
 *     P = e^(scale S - max), running max and sum (k_r_softmax)
 *     O = O e^(old max - max) + P V      by GEMM
 * and in the end O / sum. Tiles of keys begin at multiples of OP_KEYS of the sequence, so the chain
 * over keys is the same whether they come from this batch or from earlier ones. Tiles in front of
 * every query's window are left out: they add exact zeros to outputs that are zero. */
static void op_attn_tile(const op_attn *a, const op_seq *s, int h, int q0, int q1, float *scratch) {
    int g = h / (a->heads / a->kv_heads), hd = a->hd, n = q1 - q0;
    size_t ldq = (size_t)op_attn_width(a), ldo = (size_t)(a->heads * hd), cap = (size_t)s->kv.cap;
    const float *q = a->qkv + (size_t)(s->row + q0) * ldq + (size_t)(h * hd);
    const float *kp = s->kv.k + (size_t)g * (size_t)hd * cap;
    const float *vp = s->kv.v + (size_t)g * gemm_panels(hd) * RLHF_LANES * cap;
    float *o = a->o + (size_t)(s->row + q0) * ldo + (size_t)(h * hd), *sc = scratch;
    float max[OP_QUERIES], sum[OP_QUERIES], scale = op_attn_scale(a);
    for (int r = 0; r < n; r++) {
        max[r] = -INFINITY;
        sum[r] = 0;
        memset(o + (size_t)r * ldo, 0, (size_t)hd * sizeof *o);
    }
    int last = s->past + q1; /* keys that the last query sees */
    int from = op_attn_first(a, s->past + q0) / OP_KEYS * OP_KEYS;
    for (int k0 = from; k0 < last; k0 += OP_KEYS) {
        /* Scores of one tile of keys, for all n queries. */
        int keys = base_min(OP_KEYS, last - k0);
        gemm_args ga = {.m = n, .n = (int)gemm_panels(keys) * RLHF_LANES};
        ga.t = (gemm_tile_args){.k = hd,
                                .a = q,
                                .rs = ldq,
                                .cs = 1,
                                .b = kp + (size_t)k0 * (size_t)hd,
                                .bs = (size_t)hd * RLHF_LANES,
                                .c = sc,
                                .ldc = OP_KEYS};
        gemm_block(a->kt, &ga);
        /* Query r sees keys [skip, see) of the tile; the rest of its row becomes 0. */
        for (int r = 0; r < n; r++) {
            int pos = s->past + q0 + r, see = base_max(0, base_min(keys, pos + 1 - k0));
            int skip = base_min(see, base_max(0, op_attn_first(a, pos) - k0));
            float *row = sc + (size_t)r * OP_KEYS;
            if (skip < see) {
                if (a->cap != 0) a->kt->cap(see - skip, row + skip, a->scale / a->cap, a->cap);
                float fix = a->kt->softmax(see - skip, row + skip, scale, max + r, sum + r);
                if (k0 && fix != 1.0f) a->kt->scale(hd, o + (size_t)r * ldo, fix);
            }
            memset(row, 0, (size_t)skip * sizeof *row);
            memset(row + see, 0, (size_t)(keys - see) * sizeof *row);
        }
        /* Every query's P V at once; keys it does not see weigh 0. */
        gemm_args gv = {.m = n, .n = hd};
        gv.t = (gemm_tile_args){.k = keys,
                                .a = sc,
                                .rs = OP_KEYS,
                                .cs = 1,
                                .b = vp + (size_t)k0 * RLHF_LANES,
                                .bs = cap * RLHF_LANES,
                                .c = o,
                                .ldc = ldo,
                                .mode = GEMM_ACC};
        gemm_block(a->kt, &gv);
    }
    /* The division by the sum comes last: one for each output. */
    for (int r = 0; r < n; r++) {
        a->kt->scale(hd, o + (size_t)r * ldo, 1.0f / sum[r]);
        if (a->lse)
            a->lse[(size_t)(s->row + q0 + r) * (size_t)a->heads + (size_t)h] =
                max[r] + v_log1(sum[r]);
    }
}

/* Pairs (sequence, key/value head) [lo, hi): appends the group's keys and values, then runs every
 * query head that shares them, while they are in the cache. */
static void op_attn_groups(void *arg, int64_t lo, int64_t hi, int thread) {
    op_attn *a = arg;
    float *scratch = a->scratch + (size_t)thread * a->scratch_size;
    int of = a->heads / a->kv_heads;
    for (int64_t i = lo; i < hi; i++) {
        const op_seq *s = a->seq + i / a->kv_heads;
        int g = (int)(i % a->kv_heads);
        op_kv_append(a, s, g);
        for (int h = g * of; h < (g + 1) * of; h++)
            for (int q = 0; q < s->n; q += OP_QUERIES)
                op_attn_tile(a, s, h, q, base_min(q + OP_QUERIES, s->n), scratch);
    }
}

/* Groups of heads for one thread, from the mean cost of one: two products, of few rows where there
 * are many groups to share, and keys and values that come from memory. */
static int64_t op_attn_grain(const op_attn *a) {
    int64_t pairs = 0;
    for (int i = 0; i < a->seqs; i++)
        pairs += (int64_t)a->seq[i].n * (a->seq[i].past + a->seq[i].n);
    return par_grain(pairs / (a->seqs ? a->seqs : 1) * (a->heads / a->kv_heads) * a->hd * 4);
}

/* Causal attention of a ragged batch, after op_rope: o and, if not null, lse. Appends to every
 * sequence's keys and values. Scratch is one tile of scores for each thread. */
static void op_attn_fwd(op_env *e, op_attn *a) {
    arena_mark mark = arena_save(e->ws);
    a->scratch_size = OP_QUERIES * OP_KEYS;
    a->scratch = arena_floats(e->ws, a->scratch_size, (size_t)e->ctx->threads);
    par_for(e->ctx, (int64_t)a->seqs * a->kv_heads, op_attn_grain(a), op_attn_groups, a);
    arena_restore(e->ws, mark);
}

/* Where the pieces of one thread's backward scratch lie; n is the longest sequence. */
typedef struct op_attn_bwd_scratch {
    float *p, *dp, *kk, *vk, *kv, *q, *dout, *d;
    size_t size;
} op_attn_bwd_scratch;

/* The layout at base; with base null only its size, in floats. */
static op_attn_bwd_scratch op_attn_bwd_layout(int n, int hd, float *base) {
    size_t at = 0, rows = base_round_up((size_t)n, RLHF_LANES);
    size_t wide = gemm_panels(hd) * RLHF_LANES * rows, tile = OP_QUERIES * OP_KEYS;
    op_attn_bwd_scratch s = {0};
#define OP_TAKE(member, count) s.member = base ? base + at : NULL, at += (count)
    OP_TAKE(p, tile);
    OP_TAKE(dp, tile);
    OP_TAKE(kk, (size_t)hd * rows); /* K as B[hd][keys] */
    OP_TAKE(vk, (size_t)hd * rows); /* V as B[hd][keys] */
    OP_TAKE(kv, wide);              /* K as B[keys][hd] */
    OP_TAKE(q, wide);               /* Q as B[queries][hd] */
    OP_TAKE(dout, wide);            /* dO as B[queries][hd] */
    OP_TAKE(d, rows);               /* sum of dO O over a row */
#undef OP_TAKE
    s.size = base_round_up(at, RLHF_LANES);
    return s;
}

/* Packs B[k][n] on the calling thread. */
static void op_pack_here(const k_table *kt, const float *b, size_t ks, size_t ns, int k, int n,
                         float *out) {
    gemm_pack_args g = {kt, b, ks, ns, k, n, 0, out};
    gemm_pack_range(&g, 0, (int64_t)gemm_panels(n), 0);
}

/* P and dS of a tile [nq][nk] from its scores and dP, in place; 0 where the query does not see the
 * key. */
static void op_attn_bwd_scores(const op_attn *a, const op_seq *s, int h, int q0, int k0, int nq,
                               int nk, const op_attn_bwd_scratch *b) {
    for (int r = 0; r < nq; r++) {
        int see = base_max(0, base_min(nk, q0 + r + 1 - k0));
        int skip = base_min(see, base_max(0, op_attn_first(a, q0 + r) - k0)), n = see - skip;
        float *p = b->p + (size_t)r * OP_KEYS, *dp = b->dp + (size_t)r * OP_KEYS, capped[OP_KEYS];
        if (a->cap != 0) {
            a->kt->cap(n, p + skip, a->scale / a->cap, a->cap);
            memcpy(capped, p + skip, (size_t)n * sizeof *p);
        }
        a->kt->prob(n, p + skip, op_attn_scale(a),
                    a->lse[(size_t)(s->row + q0 + r) * (size_t)a->heads + (size_t)h]);
        a->kt->ds(n, p + skip, dp + skip, b->d[q0 + r], a->scale);
        if (a->cap != 0) a->kt->cap_bwd(n, capped, 1.0f / a->cap, dp + skip);
        memset(p, 0, (size_t)skip * sizeof *p);
        memset(dp, 0, (size_t)skip * sizeof *dp);
        memset(p + see, 0, (size_t)(nk - see) * sizeof *p);
        memset(dp + see, 0, (size_t)(nk - see) * sizeof *dp);
    }
}

/* One tile of queries from q0 and of keys from k0 (Dao 2023, FlashAttention-2, without a T x T
 * matrix). P comes back from the scores and the saved lse; D is the row sum of dO O:
 *     P = e^(scale Q K^T - lse)        dP = dO V^T        dS = P (dP - D) scale
 *     dQ += dS K        dK += dS^T Q        dV += P^T dO
 * A soft cap changes S as in op_attn_tile and multiplies dS by its slope 1 - (S / cap)^2. Tiles are
 * visited in one order, hence each gradient is one chain. */
static void op_attn_bwd_tile(const op_attn *a, const op_seq *s, int h, int q0, int k0,
                             const op_attn_bwd_scratch *b) {
    int g = h / (a->heads / a->kv_heads), hd = a->hd, nq = base_min(OP_QUERIES, s->n - q0);
    int nk = base_min(OP_KEYS, base_min(s->n, q0 + nq) - k0), np = (int)gemm_panels(nk);
    size_t ldq = (size_t)op_attn_width(a), ldo = (size_t)(a->heads * hd);
    size_t qcol = (size_t)(h * hd), kcol = (size_t)((a->heads + g) * hd);
    size_t vcol = kcol + (size_t)(a->kv_heads * hd), rows = base_round_up((size_t)s->n, RLHF_LANES);
    /* S = Q K^T */
    gemm_args ga = {.m = nq, .n = np * RLHF_LANES};
    ga.t = (gemm_tile_args){.k = hd,
                            .a = a->qkv + (size_t)(s->row + q0) * ldq + qcol,
                            .rs = ldq,
                            .cs = 1,
                            .b = b->kk + (size_t)k0 * (size_t)hd,
                            .bs = (size_t)hd * RLHF_LANES,
                            .c = b->p,
                            .ldc = OP_KEYS};
    gemm_block(a->kt, &ga);
    /* dP = dO V^T */
    ga.t.a = a->dout + (size_t)(s->row + q0) * ldo + qcol;
    ga.t.rs = ldo;
    ga.t.b = b->vk + (size_t)k0 * (size_t)hd;
    ga.t.c = b->dp;
    gemm_block(a->kt, &ga);
    op_attn_bwd_scores(a, s, h, q0, k0, nq, nk, b);
    gemm_args gq = {.m = nq, .n = hd}; /* for dQ */
    gq.t = (gemm_tile_args){.k = nk,
                            .a = b->dp,
                            .rs = OP_KEYS,
                            .cs = 1,
                            .b = b->kv + (size_t)k0 * RLHF_LANES,
                            .bs = rows * RLHF_LANES,
                            .c = a->dqkv + (size_t)(s->row + q0) * ldq + qcol,
                            .ldc = ldq,
                            .mode = GEMM_ACC};
    gemm_block(a->kt, &gq);            /* dQ += dS K */
    gemm_args gk = {.m = nk, .n = hd}; /* for dK, then dV */
    gk.t = (gemm_tile_args){.k = nq,
                            .a = b->dp,
                            .rs = 1,
                            .cs = OP_KEYS,
                            .b = b->q + (size_t)q0 * RLHF_LANES,
                            .bs = rows * RLHF_LANES,
                            .c = a->dqkv + (size_t)(s->row + k0) * ldq + kcol,
                            .ldc = ldq,
                            .mode = GEMM_ACC};
    gemm_block(a->kt, &gk); /* dK += dS^T Q */
    gk.t.a = b->p;
    gk.t.b = b->dout + (size_t)q0 * RLHF_LANES;
    gk.t.c = a->dqkv + (size_t)(s->row + k0) * ldq + vcol;
    gemm_block(a->kt, &gk); /* dV += P^T dO */
}

/* Packs B[k][n] whose panels are `rows` long rather than k. */
static void op_pack_rows(const k_table *kt, const float *b, size_t ks, int k, int n, size_t rows,
                         float *out) {
    for (int p = 0; p < (int)gemm_panels(n); p++)
        op_pack_here(kt, b + p * RLHF_LANES, ks, 1, k, base_min(RLHF_LANES, n - p * RLHF_LANES),
                     out + (size_t)p * rows * RLHF_LANES);
}

/* Pairs (sequence, key/value head) [lo, hi). A group's dK and dV sum over its query heads, in
 * order, so a group is the smallest unit of work. */
static void op_attn_bwd_groups(void *arg, int64_t lo, int64_t hi, int thread) {
    op_attn *a = arg;
    int of = a->heads / a->kv_heads, hd = a->hd;
    size_t ldq = (size_t)op_attn_width(a), ldo = (size_t)(a->heads * hd);
    for (int64_t i = lo; i < hi; i++) {
        const op_seq *s = a->seq + i / a->kv_heads;
        int g = (int)(i % a->kv_heads);
        size_t rows = base_round_up((size_t)s->n, RLHF_LANES);
        op_attn_bwd_scratch b =
            op_attn_bwd_layout(s->n, hd, a->scratch + (size_t)thread * a->scratch_size);
        const float *x = a->qkv + (size_t)s->row * ldq, *k = x + (a->heads + g) * hd;
        /* The group's columns of the gradient, which the tiles add to. */
        for (int r = 0; r < s->n; r++) {
            float *d = a->dqkv + (size_t)(s->row + r) * ldq;
            memset(d + g * of * hd, 0, (size_t)(of * hd) * sizeof *d);
            memset(d + (a->heads + g) * hd, 0, (size_t)hd * sizeof *d);
            memset(d + (a->heads + a->kv_heads + g) * hd, 0, (size_t)hd * sizeof *d);
        }
        /* K^T, V^T and K, once for the group; then Q, dO and D for each of its heads. */
        op_pack_here(a->kt, k, 1, ldq, hd, s->n, b.kk);
        op_pack_here(a->kt, k + a->kv_heads * hd, 1, ldq, hd, s->n, b.vk);
        op_pack_rows(a->kt, k, ldq, s->n, hd, rows, b.kv);
        for (int h = g * of; h < (g + 1) * of; h++) {
            const float *dout = a->dout + (size_t)s->row * ldo + h * hd;
            const float *o = a->o + (size_t)s->row * ldo + h * hd;
            op_pack_rows(a->kt, x + h * hd, ldq, s->n, hd, rows, b.q);
            op_pack_rows(a->kt, dout, ldo, s->n, hd, rows, b.dout);
            for (int r = 0; r < s->n; r++)
                b.d[r] = a->kt->dot(hd, dout + (size_t)r * ldo, o + (size_t)r * ldo);
            for (int q = 0; q < s->n; q += OP_QUERIES)
                for (int t = op_attn_first(a, q) / OP_KEYS * OP_KEYS;
                     t < base_min(s->n, q + OP_QUERIES); t += OP_KEYS)
                    op_attn_bwd_tile(a, s, h, q, t, &b);
        }
    }
}

/* dqkv from dout, for whole sequences (past 0) whose forward pass kept qkv, o and lse; before
 * op_rope with sign -1. Scratch grows with the longest sequence, not with its square. */
static void op_attn_bwd(op_env *e, op_attn *a) {
    arena_mark mark = arena_save(e->ws);
    /* One layout for all sequences, hence for the longest. */
    int longest = 1;
    for (int i = 0; i < a->seqs; i++) longest = base_max(longest, a->seq[i].n);
    a->scratch_size = op_attn_bwd_layout(longest, a->hd, NULL).size;
    a->scratch = arena_floats(e->ws, a->scratch_size, (size_t)e->ctx->threads);
    par_for(e->ctx, (int64_t)a->seqs * a->kv_heads, op_attn_grain(a), op_attn_bwd_groups, a);
    arena_restore(e->ws, mark);
}

/* ---- vocabulary: log-probabilities, cross-entropy, KL, without ever holding all logits ---- */

/* Rows of logits to be capped. */
typedef struct op_caps {
    const k_table *k;
    int n;
    size_t ld;
    float cap;
    float *x;
} op_caps;

/* x = cap tanh(x / cap) of rows [lo, hi), in place. */
static void op_cap_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    op_caps *o = arg;
    (void)thread;
    for (int64_t r = lo; r < hi; r++)
        o->k->cap(o->n, o->x + (size_t)r * o->ld, 1.0f / o->cap, o->cap);
}

/* Logits of m rows of hidden states x: op_linear, and the soft cap of w where it has one. */
static void op_logits(op_env *e, const op_weight *w, int m, const float *x, float *y) {
    op_linear(e, w, m, x, y, NULL, NULL, NULL);
    op_caps o = {e->ctx->k, w->n, op_ld(w), w->cap, y};
    if (w->cap != 0) par_for(e->ctx, m, par_grain(4 * w->n), op_cap_rows, &o);
}

/* What is known of each row's distribution softmax(logits * scale). Arrays [rows] may be null. */
typedef struct op_rows {
    float *logp;    /* of the row's target */
    float *entropy; /* nats */
    uint8_t *hit;   /* 1: the target is a most likely token */
} op_rows;

/* coef[i] = d loss / d logp of row `row + i`, i < n, from what the forward pass found for these
 * rows (found's arrays start at `row`). How a trainer's loss enters: it sees log-probabilities
 * only. */
typedef void op_coef_fn(void *user, int row, int n, const op_rows *found, float *coef);

/* The rows of one chunk. */
typedef struct op_vocab {
    const k_table *k;
    int n;     /* vocabulary */
    size_t ld; /* floats from one row of logits to the next */
    float scale, cap;
    float *logits, *other; /* [rows of the chunk][n] */
    const int32_t *target; /* of the chunk, as are the following */
    op_rows out;
    float *lse, *coef, *kl, *other_logp; /* [rows of the chunk] */
} op_vocab;

/* Rows of logits held at once, in one array or two: at most 64 MiB and 512 rows, in equal chunks. A
 * chunk reads W and its gradient once, from memory; more rows share that. Part of no result: a
 * row's numbers do not depend on its neighbours. */
static int op_vocab_chunk(int vocab, int rows, int arrays) {
    int most = base_max(24, base_min((1 << 24) / vocab, 512) / arrays);
    int chunks = (rows + most - 1) / most;
    return chunks ? (int)base_round_up((size_t)((rows + chunks - 1) / chunks), 8) : 1;
}

/* Log-probability, entropy and hit of rows [lo, hi), and what compares them with `other`. */
static void op_vocab_stats(void *arg, int64_t lo, int64_t hi, int thread) {
    op_vocab *v = arg;
    (void)thread;
    for (int64_t r = lo; r < hi; r++) {
        const float *x = v->logits + (size_t)r * v->ld;
        k_stats s = v->k->stats(v->n, x, v->scale);
        float z = x[v->target[r]] * v->scale;
        v->lse[r] = s.lse;
        if (v->out.logp) v->out.logp[r] = z - s.lse;
        if (v->out.entropy) v->out.entropy[r] = s.entropy;
        if (v->out.hit) v->out.hit[r] = z >= s.max;
        /* The second model on the same row. */
        if (!v->other) continue;
        const float *y = v->other + (size_t)r * v->ld;
        k_stats t = v->k->stats(v->n, y, v->scale);
        if (v->kl) v->kl[r] = (float)v->k->kl(v->n, x, y, v->scale, s.lse, t.lse);
        if (v->other_logp) v->other_logp[r] = y[v->target[r]] * v->scale - t.lse;
    }
}

/* logits become their gradient, from logp = z_target - lse with z = scale logits:
 *     d loss / d logits = coef scale (onehot(target) - p)
 * and with a soft cap that of what was capped, from pieces of the row that are kept meanwhile. */
static void op_vocab_grad(void *arg, int64_t lo, int64_t hi, int thread) {
    op_vocab *v = arg;
    (void)thread;
    for (int64_t r = lo; r < hi; r++) {
        float *x = v->logits + (size_t)r * v->ld, c = v->coef[r] * v->scale, y[1024];
        int piece = v->cap != 0 ? (int)(sizeof y / sizeof *y) : v->n, target = v->target[r];
        for (int i = 0; i < v->n; i += piece) {
            int n = base_min(piece, v->n - i);
            if (v->cap != 0) memcpy(y, x + i, (size_t)n * sizeof *y);
            v->k->ce(n, x + i, v->scale, v->lse[r], -c);
            if (target >= i && target - i < n) x[target] += c;
            if (v->cap != 0) v->k->cap_bwd(n, y, 1.0f / v->cap, x + i);
        }
    }
}

/* The part [row, row + ...) of arrays that start at row 0. */
static op_rows op_rows_at(const op_rows *o, int row) {
    return (op_rows){o->logp ? o->logp + row : NULL, o->entropy ? o->entropy + row : NULL,
                     o->hit ? o->hit + row : NULL};
}

/* The head with rows of logits that are no multiple of a page apart: else the rows of a tile would
 * share one set of the first-level cache. */
static op_weight op_vocab_weight(const op_weight *w) {
    op_weight o = *w;
    o.ld = (int)base_round_up((size_t)w->n, RLHF_LANES) + RLHF_LANES;
    return o;
}

/* rows hidden states x [rows][d] against the vocabulary W [n][d], in chunks: fills out for target
 * [rows]; with coef also dx [rows][d] (overwritten) and the weight's gradient. coef is called once
 * a chunk, in order of rows. */
static void op_vocab_run(op_env *e, const op_weight *w, int rows, const float *x,
                         const int32_t *target, float scale, const op_rows *out, op_coef_fn *coef,
                         void *user, float *dx) {
    arena_mark mark = arena_save(e->ws);
    int chunk = op_vocab_chunk(w->n, rows, 1);
    op_weight lw = op_vocab_weight(w);
    op_vocab v = {.k = e->ctx->k, .n = w->n, .ld = op_ld(&lw), .scale = scale, .cap = w->cap};
    v.logits = arena_floats(e->ws, (size_t)chunk, v.ld);
    v.lse = arena_floats(e->ws, (size_t)chunk, 2);
    v.coef = v.lse + chunk;
    for (int r = 0; r < rows; r += chunk) {
        int n = base_min(chunk, rows - r);
        const float *xr = x + (size_t)r * (size_t)w->k;
        op_logits(e, &lw, n, xr, v.logits);
        v.target = target + r;
        v.out = op_rows_at(out, r);
        par_for(e->ctx, n, par_grain(4 * w->n), op_vocab_stats, &v);
        /* The logits of the chunk become their gradient, which is used up before the next chunk. */
        if (!coef) continue;
        coef(user, r, n, &v.out, v.coef);
        par_for(e->ctx, n, par_grain(4 * w->n), op_vocab_grad, &v);
        op_linear_bwd_x(e, &lw, n, v.logits, dx + (size_t)r * (size_t)w->k);
        op_linear_bwd_w(e, &lw, n, xr, v.logits);
    }
    arena_restore(e->ws, mark);
}

/* Two models on the same rows: kl[r] = KL(first || second) over the whole vocabulary, in nats,
 * other_logp[r] = the second's log-probability of the target; out is about the first. kl and
 * other_logp may be null. */
static void op_vocab_compare(op_env *e, const op_weight *w, const float *x, const op_weight *w2,
                             const float *x2, int rows, const int32_t *target, float scale,
                             const op_rows *out, float *kl, float *other_logp) {
    arena_mark mark = arena_save(e->ws);
    int chunk = op_vocab_chunk(w->n, rows, 2);
    op_weight lw = op_vocab_weight(w), lw2 = op_vocab_weight(w2);
    op_vocab v = {.k = e->ctx->k, .n = w->n, .ld = op_ld(&lw), .scale = scale};
    v.logits = arena_floats(e->ws, (size_t)chunk, v.ld);
    v.other = arena_floats(e->ws, (size_t)chunk, v.ld);
    v.lse = arena_floats(e->ws, (size_t)chunk, 1);
    /* Both models' logits of the same rows side by side. */
    for (int r = 0; r < rows; r += chunk) {
        int n = base_min(chunk, rows - r);
        op_logits(e, &lw, n, x + (size_t)r * (size_t)w->k, v.logits);
        op_logits(e, &lw2, n, x2 + (size_t)r * (size_t)w2->k, v.other);
        v.target = target + r;
        v.out = op_rows_at(out, r);
        v.kl = kl ? kl + r : NULL;
        v.other_logp = other_logp ? other_logp + r : NULL;
        par_for(e->ctx, n, par_grain(4 * w->n), op_vocab_stats, &v);
    }
    arena_restore(e->ws, mark);
}
/* ============================================================================================
 * MARK: - 11 IO (io_)
 * Files. Reads are bounded and unpack gzip by themselves; large read-only files are mapped; a file
 * is written beside its place and renamed, so that a reader never sees half of one and a failed
 * call leaves nothing behind. Every error names the path and the system's reason. No file stays
 * open after the public call that opened it; mapped are those of a model's base, as long as it.
 * ============================================================================================ */

/* The bound for files that are read whole: far above any tokenizer, below a mistake. */
#define IO_LIMIT ((size_t)1 << 32)

/* A read-only view of a whole file. */
typedef struct io_view {
    const unsigned char *data;
    size_t size;
} io_view;

/* A file being written under a temporary name. */
typedef struct io_file {
    rlhf_ctx *ctx;
    FILE *stream;
    char *path, *temp;
} io_file;

/* Throws "PATH: cannot VERB: reason"; error is an errno. */
__attribute__((noreturn)) static void io_fail(rlhf_ctx *ctx, const char *verb, const char *path,
                                              int error) {
    err_throw(ctx, RLHF_ERR_IO, "%s: cannot %s: %s", path, verb, strerror(error));
}

/* Whether there is anything at path that can be looked at. */
static int io_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
}

/* Whether path is a directory, through links. */
static int io_is_dir(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* dir/name, as a block. An empty dir is the current one. */
static char *io_join(rlhf_ctx *ctx, const char *dir, const char *name) {
    size_t n = strlen(dir);
    return mem_printf(ctx, "%s%s%s", dir, n && dir[n - 1] != '/' ? "/" : "", name);
}

/* Makes a directory and those above it; one that exists is as good as made. */
static void io_mkdirs(rlhf_ctx *ctx, const char *dir) {
    if (!*dir) return;
    char *path = mem_strdup(ctx, dir);
    for (char *p = path + 1;; p++) {
        char c = *p;
        if (c && c != '/') continue;
        *p = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            io_fail(ctx, "make the directory", path, errno);
        *p = c;
        if (!c) break;
    }
    if (!io_is_dir(path)) io_fail(ctx, "make the directory", path, ENOTDIR);
    mem_free(path);
}

/* For err_defer, as are io_unmap and io_discard. */
static void io_close_gz(void *gz) { gzclose((gzFile)gz); }

/* The whole file as a NUL-terminated block of *len bytes; gzip is recognised by its first bytes.
 * More than limit bytes (unpacked) are an error. */
static char *io_read(rlhf_ctx *ctx, const char *path, size_t limit, size_t *len) {
    struct stat st;
    if (stat(path, &st) != 0) io_fail(ctx, "read", path, errno);
    if (S_ISDIR(st.st_mode)) io_fail(ctx, "read", path, EISDIR);
    gzFile gz = gzopen(path, "rb");
    if (!gz) io_fail(ctx, "read", path, errno ? errno : ENOMEM);
    err_defer(ctx, io_close_gz, gz);
    gzbuffer(gz, 1 << 17);
    /* One byte over the size lets the last read see the end without growing. */
    size_t n = 0, cap = st.st_size > 0 ? (size_t)st.st_size + 1 : 4096;
    if (cap > limit) cap = limit + 1;
    char *p = mem_alloc(ctx, cap + 1);
    for (;;) {
        if (n == cap) {
            cap = base_mul(ctx, cap, 2);
            p = mem_realloc(ctx, p, cap + 1);
        }
        size_t want = cap - n < (1u << 30) ? cap - n : (1u << 30);
        errno = 0;
        int got = gzread(gz, p + n, (unsigned)want), code = Z_OK;
        if (got < (int)want) {
            gzerror(gz, &code);
            if (code == Z_ERRNO) io_fail(ctx, "read", path, errno);
            if (got < 0 || (code != Z_OK && code != Z_STREAM_END))
                err_throw(ctx, RLHF_ERR_IO, "%s: the gzip data is damaged or cut short", path);
        }
        n += (size_t)got;
        if (n > limit) err_throw(ctx, RLHF_ERR_IO, "%s: larger than %zu bytes", path, limit);
        if (got == 0) break;
    }
    err_release(ctx);
    p[n] = 0;
    *len = n;
    return p;
}

static void io_unmap(void *view) {
    io_view *v = view;
    if (v->size) munmap((void *)(uintptr_t)v->data, v->size);
    mem_free(v);
}

/* Maps a file. The view is deferred: err_keep it to own it (io_unmap gives it back), or err_release
 * it. An empty file is a view of size 0. */
static io_view *io_map(rlhf_ctx *ctx, const char *path) {
    io_view *v = mem_zalloc(ctx, 1, sizeof *v);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) io_fail(ctx, "read", path, errno);
    struct stat st;
    int error = fstat(fd, &st) != 0 ? errno : S_ISDIR(st.st_mode) ? EISDIR : 0;
    void *p = NULL;
    if (!error && st.st_size > 0) {
        p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) error = errno;
    }
    close(fd);
    if (error) io_fail(ctx, "read", path, error);
    v->data = p;
    v->size = (size_t)st.st_size;
    err_defer(ctx, io_unmap, v);
    return v;
}

/* Gives back the memory of whole pages of a view in [data, data + size), which will not be read
 * soon; they come from the file again. Elsewhere than in the view: nothing. */
static void io_forget(const io_view *v, const void *data, size_t size) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)data, to = from + size;
    uintptr_t first = (uintptr_t)v->data;
    if (from < first || to > first + v->size) return;
    from = (from + page - 1) / page * page;
    to = to / page * page;
    if (from < to) madvise((void *)from, (size_t)(to - from), MADV_DONTNEED);
}

/* Ends a file that is not to be: the temporary goes, what stood under its path stays. */
static void io_discard(void *file) {
    io_file *f = file;
    if (f->stream) fclose(f->stream);
    unlink(f->temp);
    mem_free(f->temp);
    mem_free(f->path);
    mem_free(f);
}

/* Begins a file that appears under path at io_commit, and not at all if the call fails before.
 * Stays on the defer stack until then. */
static io_file *io_create(rlhf_ctx *ctx, const char *path) {
    io_file *f = mem_zalloc(ctx, 1, sizeof *f);
    f->ctx = ctx;
    f->path = mem_strdup(ctx, path);
    f->temp = mem_printf(ctx, "%s.%ld.tmp", path, (long)getpid());
    f->stream = fopen(f->temp, "wb");
    if (!f->stream) io_fail(ctx, "write", path, errno);
    err_defer(ctx, io_discard, f);
    return f;
}

/* Appends n bytes; a full disk shows here or at io_commit. */
static void io_write(io_file *f, const void *data, size_t n) {
    if (n && fwrite(data, 1, n, f->stream) != n) io_fail(f->ctx, "write", f->path, errno);
}

/* Makes the renaming of path last: best effort, some file systems cannot. */
static void io_sync_parent(rlhf_ctx *ctx, const char *path) {
    const char *slash = strrchr(path, '/');
    char *dir = slash ? mem_strndup(ctx, path, (size_t)(slash - path) + 1) : mem_strdup(ctx, ".");
    int fd = open(dir, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        (void)fsync(fd);
        close(fd);
    }
    mem_free(dir);
}

/* Puts the file in its place: data on the disk first, then the name, so that a crash leaves the old
 * file or the new one, whole. It must be the newest deferred resource. */
static void io_commit(io_file *f) {
    rlhf_ctx *ctx = f->ctx;
    if (fflush(f->stream) != 0 || fsync(fileno(f->stream)) != 0)
        io_fail(ctx, "write", f->path, errno);
    int failed = fclose(f->stream);
    f->stream = NULL;
    if (failed || rename(f->temp, f->path) != 0) io_fail(ctx, "write", f->path, errno);
    io_sync_parent(ctx, f->path);
    /* The temporary is gone: what is left to discard is memory. */
    err_release(ctx);
}

/* One block as a whole file. */
static void io_write_file(rlhf_ctx *ctx, const char *path, const void *data, size_t n) {
    io_file *f = io_create(ctx, path);
    io_write(f, data, n);
    io_commit(f);
}

/* ============================================================================================
 * MARK: - 12 JSON (json_)
 * What jansson lacks: errors that say file, line, key, what was found and what was expected; and
 * values that a failed call gives back. Parsed values are put on the defer stack, so that they
 * follow err_release / err_keep like any other resource. null counts as absent.
 * ============================================================================================ */

/* Where a value came from, for messages. */
typedef struct json_src {
    rlhf_ctx *ctx;
    rlhf_status status; /* of errors: RLHF_ERR_FORMAT, or RLHF_ERR_DATA for records */
    const char *file;
    int64_t line;   /* of the text's first line in the file; 0: messages name no line */
    const char *at; /* path of the enclosing object ("model."), "" at the top */
} json_src;

/* A source without a line, whose errors are RLHF_ERR_FORMAT. */
static json_src json_source(rlhf_ctx *ctx, const char *file) {
    return (json_src){ctx, RLHF_ERR_FORMAT, file, 0, ""};
}

/* For err_defer. */
static void json_drop(void *value) { json_decref(value); }

/* Gives the reference to the defer stack. null, jansson's only error when building, is thrown. */
static json_t *json_hold(rlhf_ctx *ctx, json_t *value) {
    if (!value) err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a JSON value");
    err_defer(ctx, json_drop, value);
    return value;
}

/* Parses len bytes; the value is held (err_release gives it back). For a line of a JSONL file,
 * src->line is its number. */
static json_t *json_parse(const json_src *src, const char *text, size_t len) {
    json_error_t e;
    size_t flags = JSON_ALLOW_NUL | JSON_DECODE_ANY;
    json_t *v = json_loadb(text, len, flags, &e);
    /* transformers writes 10^30 for "no limit": then all integers are read as reals. */
    if (!v && json_error_code(&e) == json_error_numeric_overflow)
        v = json_loadb(text, len, flags | JSON_DECODE_INT_AS_REAL, &e);
    if (v) return json_hold(src->ctx, v);
    if (json_error_code(&e) == json_error_out_of_memory)
        err_throw(src->ctx, RLHF_ERR_MEMORY, "%s: out of memory for the JSON value", src->file);
    int64_t line = (src->line > 0 ? src->line - 1 : 0) + (e.line > 0 ? e.line : 1);
    err_throw(src->ctx, src->status, "%s:%lld: bad JSON: %s", src->file, (long long)line, e.text);
}

/* The value of a whole file, held. */
static json_t *json_read(const json_src *src) {
    size_t len;
    char *text = io_read(src->ctx, src->file, IO_LIMIT, &len);
    json_t *v = json_parse(src, text, len);
    mem_free(text);
    return v;
}

/* A value for a message: scalars as written, shortened; others by kind. */
static const char *json_show(const json_t *v, char *out, size_t size) {
    if (!v) snprintf(out, size, "nothing");
    else if (json_is_object(v)) snprintf(out, size, "an object");
    else if (json_is_array(v)) snprintf(out, size, "an array");
    else if (json_is_string(v))
        snprintf(out, size, "\"%.40s%s\"", json_string_value(v),
                 json_string_length(v) > 40 ? "..." : "");
    else if (json_is_integer(v)) snprintf(out, size, "%lld", (long long)json_integer_value(v));
    else if (json_is_real(v)) snprintf(out, size, "%g", json_real_value(v));
    else snprintf(out, size, "%s", json_is_true(v) ? "true" : json_is_false(v) ? "false" : "null");
    return out;
}

/* "file:line: " or "file: ". */
static const char *json_place(const json_src *src, char *out, size_t size) {
    if (src->line > 0) snprintf(out, size, "%s:%lld", src->file, (long long)src->line);
    else snprintf(out, size, "%s", src->file);
    return out;
}

/* Throws: the key is missing (found null) or has the wrong value. */
__attribute__((noreturn)) static void json_bad(const json_src *src, const char *key,
                                               const json_t *found, const char *expected) {
    char place[512], value[80];
    json_place(src, place, sizeof place);
    if (!found || json_is_null(found))
        err_throw(src->ctx, src->status, "%s: missing \"%s%s\" (expected %s)", place, src->at, key,
                  expected);
    err_throw(src->ctx, src->status, "%s: key \"%s%s\": found %s, expected %s", place, src->at, key,
              json_show(found, value, sizeof value), expected);
}

/* The member, or null if it is absent or null. */
static json_t *json_get(const json_t *object, const char *key) {
    json_t *v = json_object_get(object, key);
    return v && !json_is_null(v) ? v : NULL;
}

/* Required members (json_need_*) and optional ones with a default (json_opt_*). Strings, arrays and
 * objects are borrowed from the parsed value. */

static json_t *json_need_object(const json_src *src, const json_t *object, const char *key) {
    json_t *v = json_get(object, key);
    if (!json_is_object(v)) json_bad(src, key, v, "an object");
    return v;
}

static json_t *json_opt_object(const json_src *src, const json_t *object, const char *key) {
    return json_get(object, key) ? json_need_object(src, object, key) : NULL;
}

static json_t *json_need_array(const json_src *src, const json_t *object, const char *key) {
    json_t *v = json_get(object, key);
    if (!json_is_array(v)) json_bad(src, key, v, "an array");
    return v;
}

static json_t *json_opt_array(const json_src *src, const json_t *object, const char *key) {
    return json_get(object, key) ? json_need_array(src, object, key) : NULL;
}

static const char *json_need_str(const json_src *src, const json_t *object, const char *key) {
    json_t *v = json_get(object, key);
    if (!json_is_string(v)) json_bad(src, key, v, "a string");
    if (strlen(json_string_value(v)) != json_string_length(v))
        json_bad(src, key, v, "a string without NUL characters");
    return json_string_value(v);
}

static const char *json_opt_str(const json_src *src, const json_t *object, const char *key,
                                const char *def) {
    return json_get(object, key) ? json_need_str(src, object, key) : def;
}

/* A real without fraction is an integer too. */
static int64_t json_need_int(const json_src *src, const json_t *object, const char *key, int64_t lo,
                             int64_t hi) {
    json_t *v = json_get(object, key);
    int64_t i = json_integer_value(v);
    int ok = json_is_integer(v);
    double r = json_real_value(v);
    if (json_is_real(v) && fabs(r) < 9e15 && r == floor(r)) {
        i = (int64_t)r;
        ok = 1;
    }
    if (ok && i >= lo && i <= hi) return i;
    char expected[96];
    snprintf(expected, sizeof expected, "an integer from %lld to %lld", (long long)lo,
             (long long)hi);
    json_bad(src, key, v, expected);
}

static int64_t json_opt_int(const json_src *src, const json_t *object, const char *key, int64_t lo,
                            int64_t hi, int64_t def) {
    return json_get(object, key) ? json_need_int(src, object, key, lo, hi) : def;
}

/* Integers are reals too. */
static double json_need_real(const json_src *src, const json_t *object, const char *key) {
    json_t *v = json_get(object, key);
    if (!json_is_number(v)) json_bad(src, key, v, "a number");
    return json_number_value(v);
}

static double json_opt_real(const json_src *src, const json_t *object, const char *key,
                            double def) {
    return json_get(object, key) ? json_need_real(src, object, key) : def;
}

static int json_opt_bool(const json_src *src, const json_t *object, const char *key, int def) {
    json_t *v = json_get(object, key);
    if (!v) return def;
    if (!json_is_boolean(v)) json_bad(src, key, v, "true or false");
    return json_is_true(v);
}

/* The value as text, a block of *len bytes. flags: jansson's, such as JSON_COMPACT. */
static char *json_text(rlhf_ctx *ctx, const json_t *value, size_t flags, size_t *len) {
    flags |= JSON_ENCODE_ANY | JSON_REAL_PRECISION(17);
    size_t n = json_dumpb(value, NULL, 0, flags);
    char *p = mem_alloc(ctx, n + 1);
    if (n == 0 || json_dumpb(value, p, n, flags) != n)
        err_throw(ctx, RLHF_ERR_MEMORY, "out of memory while writing JSON");
    p[n] = 0;
    if (len) *len = n;
    return p;
}

/* Writes the value, indented and with a final newline, as a whole file. */
static void json_write_file(rlhf_ctx *ctx, const char *path, const json_t *value) {
    size_t n;
    char *text = json_text(ctx, value, JSON_INDENT(2), &n);
    io_file *f = io_create(ctx, path);
    io_write(f, text, n);
    io_write(f, "\n", 1);
    io_commit(f);
    mem_free(text);
}

/* ============================================================================================
 * MARK: - 13 TOK (tok_)
 * Tokenizers as Hugging Face's tokenizer.json describes them: byte-level and SentencePiece-style
 * BPE (Sennrich et al. 2016). Opening flattens the file into a list of steps (split at added
 * tokens, normalize, split at added tokens again, pre-tokenize) that tok_run walks recursively down
 * to words; a word becomes symbols that are merged by rank. What the file asks for and is not known
 * here is an error that names it; only its truncation and padding are ignored, as transformers does
 * too. Text that is not UTF-8 counts as what Python's errors="replace" makes of it: U+FFFD for each
 * maximal bad part.
 * Entry: tok_encode, tok_decode.   Invariant: the cache of words changes time, never ids.
 * Tests: test/test_tok.c
 * ============================================================================================ */

enum {
    TOK_CACHE = 1 << 15, /* words whose ids are remembered; a power of two */
    TOK_CACHE_KEY = 26,  /* longest such word in bytes, and its longest ids: 64 bytes an entry */
    TOK_CACHE_IDS = 9,
    TOK_MAX_ID = 1 << 24, /* ids beyond are a damaged file, not a vocabulary */
    TOK_MAX_STEPS = 256,  /* of a tokenizer: encoding recurses once for each */
    TOK_MIN_PAIRS = 2,    /* training merges no pair that occurs less often */
    TOK_BYTE_CPS = 324    /* one more than the largest character that stands for a byte */
};

/* Kinds of steps. Encoding: text is cut (ADDED, SPLIT) or rewritten. Decoding: lists of tokens. */
enum {
    TOK_ADDED,    /* cut out added tokens; mode: 0 those matched as written, 1 the normalized */
    TOK_SPLIT,    /* cut at matches of re; mode: behavior; flag: at what does not match */
    TOK_UNICODE,  /* mode: utf8proc's options for the normal form */
    TOK_REPLACE,  /* matches of re by text; decoding: in each token */
    TOK_PREFIX,   /* put text before; mode: always, unless there, also only at the start */
    TOK_BYTES,    /* decode: characters that stand for bytes */
    TOK_FALLBACK, /* decode: <0xHH> tokens */
    TOK_FUSE,     /* decode: all tokens become one */
    TOK_STRIP,    /* decode: text off the ends, at most mode and flag times */
    TOK_METASPACE /* decode: text is a space; mode: it vanishes from the first token */
};
enum { TOK_ALWAYS, TOK_UNLESS, TOK_FIRST };
enum { TOK_ISOLATED, TOK_REMOVED, TOK_CONTIGUOUS, TOK_WITH_PREVIOUS, TOK_WITH_NEXT };

#define TOK_GPT2_PATTERN                                                                           \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define TOK_DIGIT_PATTERN "\\p{N}"
#define TOK_END_OF_TEXT "<|endoftext|>"
#define TOK_SPACE "\xE2\x96\x81" /* U+2581, SentencePiece's visible space */

/* One step; fields that its kind does not name are unused. A TOK_SPLIT's text is its pattern. */
typedef struct tok_step {
    int kind, mode, flag;
    pcre2_code *re;
    const char *text;
    size_t len;
} tok_step;

/* What an id stands for. */
typedef struct tok_piece {
    const char *text; /* null: no such id */
    int len;
    int special;
} tok_piece;

/* A token that is found in the text before anything else. */
typedef struct tok_added {
    const char *content; /* as in the file */
    const char *text;    /* as it is looked for */
    size_t len;
    int32_t id;
    int lstrip, rstrip, single_word, normalized;
} tok_added;

/* One merge: left and right become id; its index is its rank, lowest first. */
typedef struct tok_rule {
    int32_t left, right, id;
} tok_rule;

/* One remembered word and its ids. A newer word in the same place takes it over. */
typedef struct tok_cached {
    uint8_t len, n;
    char key[TOK_CACHE_KEY];
    int32_t ids[TOK_CACHE_IDS];
} tok_cached;
_Static_assert(sizeof(tok_cached) == 64, "one cache line");

/* Entries of stb_ds's tables. */
typedef struct tok_word_id {
    char *key;
    int32_t value;
} tok_word_id;
typedef struct tok_char_id {
    uint32_t key;
    int32_t value;
} tok_char_id;
typedef struct tok_pair_rank {
    uint64_t key;
    int32_t value;
} tok_pair_rank;

/* Everything is fixed once tok_parse returns, except the cache. */
struct rlhf_tokenizer {
    rlhf_ctx *ctx;
    char *json, *config, *jinja; /* the files as read; saved as they were. null: there was none */
    size_t json_len, config_len, jinja_len;
    pcre2_general_context *pcre;
    tok_piece *pieces;    /* [vocab_size] */
    int vocab_size;       /* largest id + 1 */
    char *blob;           /* texts of the model's pieces */
    tok_word_id *words;   /* stb_ds: text -> id, of the model's pieces */
    tok_char_id *chars;   /* stb_ds: code point -> id, of pieces of one character */
    tok_pair_rank *ranks; /* stb_ds: (left id << 32 | right id) -> index in rules */
    tok_rule *rules;      /* [n_rules] */
    int n_rules;
    tok_added *added;           /* stb_ds; those of mode 0, then 1; by first byte, longest first */
    int bucket[2][257];         /* where each first byte begins in added */
    tok_step *steps, *decoders; /* stb_ds */
    const char *chat_template;  /* Jinja; null: none */
    char **texts;               /* stb_ds: strings that steps point at */
    int32_t *before, *after;    /* stb_ds: ids the post-processor adds */
    int32_t byte_id[256];       /* of the byte's character, or of <0xHH> */
    uint16_t byte_cp[256];      /* the character that stands for a byte (GPT-2) */
    int16_t cp_byte[TOK_BYTE_CPS];
    int byte_level, byte_fallback, fuse_unk, ignore_merges;
    int unk, eos, bos; /* -1: none */
    int longest;       /* bytes of the longest piece */
    int cut;           /* no merge joins anything with a U+2581 after it */
    tok_cached *cache; /* [TOK_CACHE], by hash */
};

/* Growable ids. The memory is blocks of the context: it belongs to the call that made it. */
typedef struct tok_ids {
    int32_t *ids;
    int n, cap;
} tok_ids;

/* Growable bytes. */
typedef struct tok_buf {
    rlhf_ctx *ctx;
    char *p;
    size_t n, cap;
} tok_buf;

/* Appends one id. */
static void tok_push(rlhf_ctx *ctx, tok_ids *a, int32_t id) {
    if (a->n == a->cap) {
        if (a->cap > INT_MAX / 2) err_throw(ctx, RLHF_ERR_MEMORY, "more than 2^31 tokens");
        int cap = a->cap ? a->cap * 2 : 64;
        a->ids = mem_realloc(ctx, a->ids, (size_t)cap * sizeof *a->ids);
        a->cap = cap;
    }
    a->ids[a->n++] = id;
}

/* Appends n bytes and keeps a NUL behind them. */
static void tok_put(tok_buf *b, const char *s, size_t n) {
    if (b->cap - b->n <= n) {
        b->cap = base_mul(b->ctx, b->cap + n + 32, 2);
        b->p = mem_realloc(b->ctx, b->p, b->cap);
    }
    if (n) memcpy(b->p + b->n, s, n);
    b->n += n;
    b->p[b->n] = 0;
}

/* ---- UTF-8 ---- */

/* The character at s, n > 0 bytes left: its length; *cp = UINT32_MAX for a bad sequence, whose
 * length is that of its longest prefix that some character begins with (Unicode 3.9, as Python). */
static int tok_char(const char *s, size_t n, uint32_t *cp) {
    const unsigned char *p = (const unsigned char *)s;
    uint32_t c = p[0];
    *cp = c;
    if (c < 0x80) return 1;
    *cp = UINT32_MAX;
    if (c < 0xC2 || c > 0xF4) return 1;
    int need = c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
    unsigned lo = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    unsigned hi = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    uint32_t value = c & (0x3Fu >> need);
    for (int i = 1; i <= need; i++) {
        if ((size_t)i >= n || p[i] < lo || p[i] > hi) return i;
        value = value << 6 | (p[i] & 0x3Fu);
        lo = 0x80;
        hi = 0xBF;
    }
    *cp = value;
    return need + 1;
}

/* The UTF-8 of a character; returns its length. */
static int tok_put_char(char out[4], uint32_t cp) {
    return (int)utf8proc_encode_char((utf8proc_int32_t)cp, (utf8proc_uint8_t *)out);
}

/* null if the text is UTF-8; else a block with U+FFFD for what is not, and its length in *n. */
static char *tok_lossy(rlhf_ctx *ctx, const char *s, size_t *n) {
    tok_buf b = {ctx, NULL, 0, 0};
    size_t done = 0, i = 0, len = *n;
    while (i < len) {
        /* ASCII, eight bytes at a time. */
        uint64_t eight;
        if (len - i >= 8 && (memcpy(&eight, s + i, 8), !(eight & 0x8080808080808080u))) {
            i += 8;
            continue;
        }
        uint32_t cp;
        int k = tok_char(s + i, len - i, &cp);
        if (cp == UINT32_MAX) {
            tok_put(&b, s + done, i - done);
            tok_put(&b, "\xEF\xBF\xBD", 3);
            done = i + (size_t)k;
        }
        i += (size_t)k;
    }
    if (!b.p) return NULL;
    tok_put(&b, s + done, len - done);
    *n = b.n;
    return b.p;
}

/* White_Space of Unicode. */
static int tok_is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

/* What \w matches: letters, marks, decimal and letter numbers, connectors, joiners. */
static int tok_is_word(uint32_t c) {
    int g = (int)utf8proc_category((utf8proc_int32_t)c);
    return (g >= UTF8PROC_CATEGORY_LU && g <= UTF8PROC_CATEGORY_NL) || g == UTF8PROC_CATEGORY_PC ||
           c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) ||
           (c >= 0x1F130 && c <= 0x1F189 && c != 0x1F14A && c != 0x1F14F && c != 0x1F16A);
}

/* Where the character before s[i] begins, i > 0. */
static size_t tok_back(const char *s, size_t i) {
    do i--;
    while (i > 0 && ((unsigned char)s[i] & 0xC0) == 0x80);
    return i;
}

/* ---- regular expressions ---- */

/* pcre2 expects null, not a jump, when memory is out: its calls end here. */
static void *tok_pcre_alloc(size_t size, void *user) {
    rlhf_ctx *ctx = user;
    err_frame frame;
    mem_enter(ctx, &frame);
    if (setjmp(frame.jump)) {
        mem_leave(ctx, 1);
        return NULL;
    }
    void *p = mem_alloc(ctx, size);
    mem_leave(ctx, 0);
    return p;
}

/* The other half. pcre2 frees through the general context that it allocated with. */
static void tok_pcre_free(void *p, void *user) {
    (void)user;
    mem_free(p);
}

/* The pattern with \s in the sense of Unicode's White_Space (as Oniguruma, with which the patterns
 * are run by the reference): pcre2's has U+180E besides. All else means the same to both. */
static char *tok_pattern_text(rlhf_ctx *ctx, const char *s, size_t n) {
    static const char space[] = "\\t-\\r\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}"
                                "\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
    tok_buf b = {ctx, NULL, 0, 0};
    int in_class = 0;
    for (size_t i = 0; i < n; i++) {
        /* Inside a class the ranges stand as they are; outside they need one of their own. */
        int escaped = s[i] == '\\' && i + 1 < n;
        if (escaped && (s[i + 1] == 's' || (s[i + 1] == 'S' && !in_class))) {
            if (!in_class) tok_put(&b, s[i + 1] == 's' ? "[" : "[^", s[i + 1] == 's' ? 1 : 2);
            tok_put(&b, space, sizeof space - 1);
            if (!in_class) tok_put(&b, "]", 1);
            i++;
            continue;
        }
        if (!escaped && s[i] == '[') in_class = 1;
        if (!escaped && s[i] == ']') in_class = 0;
        tok_put(&b, s + i, escaped ? 2 : 1);
        i += (size_t)escaped;
    }
    tok_put(&b, "", 0);
    return b.p;
}

/* A compiled pattern of n bytes, the caller's to free; literal: it is text to be found as it is.
 * Patterns that pcre2 does not take are an error with its reason. */
static pcre2_code *tok_compile(rlhf_tokenizer *t, const json_src *src, const char *pattern,
                               size_t n, int literal) {
    rlhf_ctx *ctx = t->ctx;
    int error;
    size_t at;
    char *text = literal ? mem_strndup(ctx, pattern, n) : tok_pattern_text(ctx, pattern, n);
    pcre2_compile_context *cc = pcre2_compile_context_create(t->pcre);
    if (!cc) err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a pattern");
    uint32_t flags = PCRE2_UTF | PCRE2_NO_UTF_CHECK | (literal ? PCRE2_LITERAL : PCRE2_UCP);
    pcre2_code *re =
        pcre2_compile((PCRE2_SPTR)text, literal ? n : strlen(text), flags, &error, &at, cc);
    pcre2_compile_context_free(cc);
    mem_free(text);
    if (!re && error == PCRE2_ERROR_HEAP_FAILED)
        err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a pattern");
    if (!re) {
        char why[160];
        pcre2_get_error_message(error, (PCRE2_UCHAR *)why, sizeof why);
        err_throw(ctx, RLHF_ERR_UNSUPPORTED, "%s: the pattern \"%.*s\": %s", src->file,
                  n > 200 ? 200 : (int)n, pattern, why);
    }
    /* Where there is no JIT, matching works without. */
    (void)pcre2_jit_compile(re, PCRE2_JIT_COMPLETE);
    return re;
}

/* ---- encoding: cuts and rewrites ---- */

/* A piece of a word that is being merged, in a doubly linked list by index. */
typedef struct tok_symbol {
    int32_t id, prev, next; /* id -1: merged away */
} tok_symbol;

/* Smallest key first, then smallest tie. */
typedef struct tok_entry {
    uint64_t key, tie;
} tok_entry;

/* A binary heap, smallest on top. */
typedef struct tok_heap {
    rlhf_ctx *ctx;
    tok_entry *e;
    size_t n, cap;
} tok_heap;

/* A word of the training text and how often it occurs. */
typedef struct tok_count {
    char *key;
    int64_t value;
} tok_count;

/* The state of one call. */
typedef struct tok_enc {
    rlhf_tokenizer *t;
    tok_ids *out;
    pcre2_match_data *md;
    tok_symbol *symbols;
    size_t symbols_cap;
    tok_heap heap;
    tok_buf scratch;
    tok_count **counts; /* training: words are counted here (stb_ds) instead of encoded */
} tok_enc;

/* Walks the parts of a text. Each step's result: [lo, hi), and id or -1 for text to go on with. */
typedef struct tok_cursor {
    const char *s;
    size_t n;
    size_t at, search; /* given out up to at; matches are sought from search on */
    size_t m_lo, m_hi; /* a match that is not yet given out */
    int m_id, found;
    size_t r_lo, r_hi; /* a part read ahead, when held */
    int r_flag, held;
    size_t lo, hi;
    int id;
} tok_cursor;

/* First match of re at or after start: 1 and the range, or 0. */
static int tok_match(tok_enc *e, const pcre2_code *re, const char *s, size_t n, size_t start,
                     size_t *lo, size_t *hi) {
    rlhf_ctx *ctx = e->t->ctx;
    PCRE2_SPTR p = (PCRE2_SPTR)s;
    int rc = pcre2_match(re, p, n, start, PCRE2_NO_UTF_CHECK, e->md, NULL);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(re, p, n, start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, e->md, NULL);
    if (rc == PCRE2_ERROR_NOMATCH) return 0;
    if (rc == PCRE2_ERROR_NOMEMORY) err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a match");
    if (rc < 0) err_throw(ctx, RLHF_ERR_DATA, "a text is too complex for the tokenizer's pattern");
    const size_t *ov = pcre2_get_ovector_pointer(e->md);
    *lo = ov[0];
    *hi = ov[1];
    return 1;
}

/* The next match of st->re or stretch between matches into r_lo, r_hi; r_flag: which. An empty
 * match is an empty part: it cuts, and is dropped later. */
static int tok_next_raw(tok_enc *e, const tok_step *st, tok_cursor *c) {
    if (!c->found) {
        if (c->at == c->n) return 0;
        c->found = 1;
        c->m_lo = c->m_hi = c->n;
        if (c->search < c->n && tok_match(e, st->re, c->s, c->n, c->search, &c->m_lo, &c->m_hi)) {
            uint32_t cp;
            c->search = c->m_hi;
            if (c->m_lo == c->m_hi && c->search < c->n)
                c->search += (size_t)tok_char(c->s + c->search, c->n - c->search, &cp);
        }
    }
    c->r_lo = c->at;
    c->r_flag = c->at >= c->m_lo;
    c->r_hi = c->r_flag ? c->m_hi : c->m_lo;
    c->at = c->r_hi;
    if (c->r_flag || c->at == c->n) c->found = 0;
    c->r_flag ^= st->flag;
    return 1;
}

/* Whether a part (is_match) goes with its predecessor (was_match). */
static int tok_joined(int behavior, int was_match, int is_match) {
    if (behavior == TOK_CONTIGUOUS) return was_match == is_match;
    if (behavior == TOK_WITH_PREVIOUS) return !was_match && is_match;
    return behavior == TOK_WITH_NEXT && was_match && !is_match;
}

/* The next part of a SPLIT step into lo, hi, by its behavior; 0 at the end. */
static int tok_next_split(tok_enc *e, const tok_step *st, tok_cursor *c) {
    int flag;
    c->id = -1;
    do {
        if (!c->held && !tok_next_raw(e, st, c)) return 0;
        c->lo = c->r_lo;
        c->hi = c->r_hi;
        flag = c->r_flag;
        while ((c->held = tok_next_raw(e, st, c)) && tok_joined(st->mode, flag, c->r_flag)) {
            c->hi = c->r_hi;
            flag = c->r_flag;
        }
    } while (st->mode == TOK_REMOVED && flag);
    return 1;
}

/* The longest added token of a set that s begins with, or null. */
static const tok_added *tok_added_at(const rlhf_tokenizer *t, int set, const char *s, size_t n) {
    const int *bucket = t->bucket[set] + (unsigned char)*s;
    for (int i = bucket[0]; i < bucket[1]; i++) {
        const tok_added *a = &t->added[i];
        if (a->len <= n && memcmp(a->text, s, a->len) == 0) return a;
    }
    return NULL;
}

/* Whether a token at [lo, hi) stands alone: no word character on either side. */
static int tok_alone(const char *s, size_t n, size_t lo, size_t hi) {
    uint32_t cp;
    if (lo > 0) {
        size_t i = tok_back(s, lo);
        tok_char(s + i, n - i, &cp);
        if (tok_is_word(cp)) return 0;
    }
    if (hi == n) return 1;
    tok_char(s + hi, n - hi, &cp);
    return !tok_is_word(cp);
}

/* The range that an added token found at [lo, hi) takes: with lstrip and rstrip also the white
 * space beside it, as far as no earlier token took it. */
static void tok_take(const tok_added *a, tok_cursor *c, size_t lo, size_t hi) {
    uint32_t cp;
    while (a->lstrip && lo > c->at) {
        size_t i = tok_back(c->s, lo);
        tok_char(c->s + i, c->n - i, &cp);
        if (!tok_is_space(cp)) break;
        lo = i;
    }
    while (a->rstrip && hi < c->n) {
        int k = tok_char(c->s + hi, c->n - hi, &cp);
        if (!tok_is_space(cp)) break;
        hi += (size_t)k;
    }
    c->m_lo = lo;
    c->m_hi = hi;
    c->m_id = a->id;
    c->found = 1;
}

/* The next part of an ADDED step: a token (its id) or text between tokens (-1); 0 at the end.
 * Tokens are sought from the left, the longest at each place. */
static int tok_next_added(tok_enc *e, const tok_step *st, tok_cursor *c) {
    const int *bucket = e->t->bucket[st->mode];
    while (!c->found && c->search < c->n) {
        size_t i = c->search++;
        unsigned char b = (unsigned char)c->s[i];
        if (bucket[b] == bucket[b + 1]) continue;
        const tok_added *a = tok_added_at(e->t, st->mode, c->s + i, c->n - i);
        if (!a) continue;
        c->search = i + a->len;
        if (!a->single_word || tok_alone(c->s, c->n, i, c->search)) tok_take(a, c, i, c->search);
    }
    int token = c->found && c->at >= c->m_lo;
    if (!token && c->at == c->n) return 0;
    c->id = token ? c->m_id : -1;
    c->lo = c->at;
    c->hi = token ? c->m_hi : c->found ? c->m_lo : c->n;
    if (token) c->found = 0;
    c->at = c->hi;
    return 1;
}

/* Whether c is a combining mark younger than Unicode 9. The reference's tables are of that version:
 * to it these are letters, which nothing is moved across. */
static int tok_is_new_mark(uint32_t c) {
    static const uint32_t ranges[][2] = {
        {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
        {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},
        {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x10D24, 0x10D27},
        {0x10EAB, 0x10EAC}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070},
        {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x1193D, 0x1193E},
        {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
        {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
        {0x16FF0, 0x16FF1}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (c >= ranges[i][0] && c <= ranges[i][1]) return 1;
    return 0;
}

/* Appends the normal form of s. Stretches of ASCII are their own normal form, except that the
 * character before a stretch of others may combine with it. U+11A7, the vowel before the first
 * final consonant, combines with nothing; utf8proc 2.8 loses it behind a syllable. */
static void tok_normal_form(tok_buf *b, int options, const char *s, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t lo = i, mark = 0;
        while (i < n && !(s[i] & 0x80)) i++;
        /* mid: the last ASCII character before the others goes with them. */
        size_t mid = i > lo && i < n ? i - 1 : i;
        while (i < n && (s[i] & 0x80) && !mark) {
            uint32_t cp;
            size_t k = (size_t)tok_char(s + i, n - i, &cp);
            if (tok_is_new_mark(cp) || cp == 0x11A7) mark = k;
            else i += k;
        }
        tok_put(b, s + lo, mid - lo);
        const utf8proc_uint8_t *p = (const utf8proc_uint8_t *)s + mid;
        utf8proc_ssize_t len = (utf8proc_ssize_t)(i - mid);
        utf8proc_ssize_t k = utf8proc_decompose(p, len, NULL, 0, (utf8proc_option_t)options);
        if (k < 0) err_throw(b->ctx, RLHF_ERR_DATA, "%s", utf8proc_errmsg(k));
        utf8proc_int32_t *cps = mem_alloc(b->ctx, ((size_t)k + 1) * sizeof *cps);
        k = utf8proc_decompose(p, len, cps, k, (utf8proc_option_t)options);
        k = utf8proc_reencode(cps, k, (utf8proc_option_t)options);
        tok_put(b, (const char *)cps, (size_t)k);
        mem_free(cps);
        tok_put(b, s + i, mark);
        i += mark;
    }
}

/* Rewrites s by a step: a new block and its length in *n, or null if nothing changes. */
static char *tok_transform(tok_enc *e, const tok_step *st, const char *s, size_t *n, int first) {
    tok_buf b = {e->t->ctx, NULL, 0, 0};
    size_t len = *n, lo, hi, at = 0, from = 0;
    if (st->kind == TOK_PREFIX) {
        int there = len >= st->len && memcmp(s, st->text, st->len) == 0;
        if (!len || (st->mode != TOK_ALWAYS && there) || (st->mode == TOK_FIRST && !first))
            return NULL;
        tok_put(&b, st->text, st->len);
        tok_put(&b, s, len);
    } else if (st->kind == TOK_UNICODE) {
        size_t i = 0;
        while (i < len && !(s[i] & 0x80)) i++;
        if (i == len) return NULL;
        tok_normal_form(&b, st->mode, s, len);
    } else {
        /* An empty match advances by one whole character. */
        while (from <= len && tok_match(e, st->re, s, len, from, &lo, &hi)) {
            tok_put(&b, s + at, lo - at);
            tok_put(&b, st->text, st->len);
            at = hi;
            from = hi > lo ? hi : hi + 1;
            while (from < len && ((unsigned char)s[from] & 0xC0) == 0x80) from++;
        }
        if (!b.p) return NULL;
        tok_put(&b, s + at, len - at);
    }
    *n = b.n;
    return b.p;
}

/* ---- encoding: words ---- */

/* The order of the heap. */
static int tok_before(tok_entry a, tok_entry b) {
    return a.key != b.key ? a.key < b.key : a.tie < b.tie;
}

/* Adds an entry. */
static void tok_heap_push(tok_heap *h, tok_entry x) {
    if (h->n == h->cap) {
        h->cap = h->cap ? 2 * h->cap : 64;
        h->e = mem_realloc(h->ctx, h->e, base_mul(h->ctx, h->cap, sizeof *h->e));
    }
    size_t i = h->n++;
    for (; i > 0 && tok_before(x, h->e[(i - 1) / 2]); i = (i - 1) / 2) h->e[i] = h->e[(i - 1) / 2];
    h->e[i] = x;
}

/* Takes the smallest entry off; there is one. */
static tok_entry tok_heap_pop(tok_heap *h) {
    tok_entry top = h->e[0], x = h->e[--h->n];
    size_t i = 0;
    for (size_t k; (k = 2 * i + 1) < h->n; i = k) {
        if (k + 1 < h->n && tok_before(h->e[k + 1], h->e[k])) k++;
        if (!tok_before(h->e[k], x)) break;
        h->e[i] = h->e[k];
    }
    h->e[i] = x;
    return top;
}

/* Both ids as one key, ordered as (left, right). */
static uint64_t tok_pair(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* Queues the merge of symbol i with its successor, if there is one. */
static void tok_offer(tok_enc *e, int32_t i) {
    const tok_symbol *s = e->symbols;
    if (i < 0 || s[i].next < 0) return;
    tok_pair_rank *ranks = e->t->ranks;
    ptrdiff_t k = stbds_hmgeti(ranks, tok_pair(s[i].id, s[s[i].next].id));
    if (k >= 0)
        tok_heap_push(&e->heap, (tok_entry){(uint64_t)ranks[k].value << 32 | (uint32_t)i, 0});
}

/* The id of a code point's piece, or -1. */
static int32_t tok_char_piece(const rlhf_tokenizer *t, uint32_t cp) {
    tok_char_id *chars = t->chars;
    ptrdiff_t k = stbds_hmgeti(chars, cp);
    return k < 0 ? -1 : chars[k].value;
}

/* The word's characters as symbols (there is room for n); returns their number. Characters without
 * a piece become their bytes' pieces if there are all, else the unknown token (one for a run if the
 * file says so), which waits for the next known character, as in the reference. */
static int tok_symbolize(tok_enc *e, const char *s, size_t n) {
    const rlhf_tokenizer *t = e->t;
    tok_symbol *out = e->symbols;
    int count = 0, unknown = 0;
    for (size_t i = 0, k; i < n; i += k) {
        uint32_t cp = 0;
        k = t->byte_level ? 1 : (size_t)tok_char(s + i, n - i, &cp);
        int32_t id = t->byte_level ? t->byte_id[(unsigned char)s[i]] : tok_char_piece(t, cp);
        if (id >= 0) {
            if (unknown) out[count++].id = t->unk;
            unknown = 0;
            out[count++].id = id;
            continue;
        }
        /* All bytes of the character, or none. */
        if (t->byte_fallback) {
            size_t have = 0;
            while (have < k && t->byte_id[(unsigned char)s[i + have]] >= 0) have++;
            for (size_t j = 0; have == k && j < k; j++)
                out[count++].id = t->byte_id[(unsigned char)s[i + j]];
            if (have == k) continue;
        }
        if (t->unk < 0) continue;
        if (unknown && !t->fuse_unk) out[count++].id = t->unk;
        unknown = 1;
    }
    if (unknown) out[count++].id = t->unk;
    /* The chain of symbols. */
    for (int i = 0; i < count; i++) {
        out[i].prev = i - 1;
        out[i].next = i + 1 < count ? i + 1 : -1;
    }
    return count;
}

/* Byte-pair encoding of one word: the mergeable pair of lowest rank, leftmost first, until there is
 * none. O(n log n): a queue whose entries are checked when they come up. */
static void tok_bpe(tok_enc *e, const char *s, size_t n) {
    const rlhf_tokenizer *t = e->t;
    if (n > e->symbols_cap) {
        mem_free(e->symbols);
        e->symbols = NULL;
        e->symbols_cap = n < 256 ? 256 : n + n / 2;
        e->symbols = mem_alloc(t->ctx, base_mul(t->ctx, e->symbols_cap, sizeof *e->symbols));
    }
    int count = tok_symbolize(e, s, n);
    tok_symbol *y = e->symbols;
    e->heap.n = 0;
    for (int32_t i = 0; i + 1 < count; i++) tok_offer(e, i);
    /* The key is the rank above the place: lowest rank, then leftmost. An entry whose symbols have
     * changed since it was queued does not fit its rule any more. */
    while (e->heap.n) {
        uint64_t key = tok_heap_pop(&e->heap).key;
        const tok_rule *r = &t->rules[key >> 32];
        int32_t i = (int32_t)(key & 0x7FFFFFFF), j = y[i].next;
        if (y[i].id != r->left || j < 0 || y[j].id != r->right) continue;
        y[i].id = r->id;
        y[i].next = y[j].next;
        y[j].id = -1;
        if (y[i].next >= 0) y[y[i].next].prev = i;
        tok_offer(e, y[i].prev);
        tok_offer(e, i);
    }
    for (int32_t i = count ? 0 : -1; i >= 0; i = y[i].next) tok_push(t->ctx, e->out, y[i].id);
}

/* The word as the vocabulary spells it, in e->scratch. */
static const char *tok_spell(tok_enc *e, const char *s, size_t n) {
    tok_buf *b = &e->scratch;
    b->n = 0;
    if (!e->t->byte_level) tok_put(b, s, n);
    for (size_t i = 0; e->t->byte_level && i < n; i++) {
        char c[4];
        tok_put(b, c, (size_t)tok_put_char(c, e->t->byte_cp[(unsigned char)s[i]]));
    }
    tok_put(b, "", 0);
    return b->p;
}

/* Training: one more occurrence of the word. */
static void tok_count_word(tok_enc *e, const char *s, size_t n) {
    const char *key = tok_spell(e, s, n);
    ptrdiff_t i = stbds_shgeti(*e->counts, key);
    if (i >= 0) (*e->counts)[i].value++;
    else stbds_shput(*e->counts, key, 1);
}

/* Encodes one word, from memory if it came by before. */
static void tok_word(tok_enc *e, const char *s, size_t n) {
    rlhf_tokenizer *t = e->t;
    if (e->counts) {
        tok_count_word(e, s, n);
        return;
    }
    tok_cached *slot = NULL;
    if (n <= TOK_CACHE_KEY) {
        uint64_t h = n;
        for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 0x100000001b3u;
        slot = &t->cache[(h ^ h >> 29) & (TOK_CACHE - 1)];
        if (slot->len == n && memcmp(slot->key, s, n) == 0) {
            for (int i = 0; i < slot->n; i++) tok_push(t->ctx, e->out, slot->ids[i]);
            return;
        }
    }
    /* A word that is a piece as a whole is that piece, if the file says so (ignore_merges). */
    int from = e->out->n;
    ptrdiff_t whole = -1;
    if (t->ignore_merges && n <= (size_t)t->longest && (t->byte_level || !memchr(s, 0, n)))
        whole = stbds_shgeti(t->words, tok_spell(e, s, n));
    if (whole >= 0) tok_push(t->ctx, e->out, t->words[whole].value);
    else tok_bpe(e, s, n);
    int count = e->out->n - from;
    if (!slot || count > TOK_CACHE_IDS) return;
    slot->len = (uint8_t)n;
    slot->n = (uint8_t)count;
    memcpy(slot->key, s, n);
    if (count) memcpy(slot->ids, e->out->ids + from, (size_t)count * sizeof *slot->ids);
}

/* A pre-token. Where no merge can reach across the start of a word (U+2581 after something else),
 * merging the words one by one gives the same ids, and they are remembered. */
static void tok_words(tok_enc *e, const char *s, size_t n) {
    size_t from = 0;
    for (size_t i = 1; e->t->cut && i + 3 <= n; i++) {
        if (s[i] != TOK_SPACE[0] || memcmp(s + i, TOK_SPACE, 3) != 0) continue;
        if (i < 3 || memcmp(s + i - 3, TOK_SPACE, 3) != 0) {
            tok_word(e, s + from, i - from);
            from = i;
        }
        i += 2;
    }
    tok_word(e, s + from, n - from);
}

/* Sends a text through the steps from number step on. first: it begins the whole text. */
static void tok_run(tok_enc *e, int step, const char *s, size_t n, int first) {
    const rlhf_tokenizer *t = e->t;
    if (n == 0) return;
    if (step == (int)stbds_arrlen(t->steps)) {
        tok_words(e, s, n);
        return;
    }
    const tok_step *st = &t->steps[step];
    if (st->kind == TOK_ADDED || st->kind == TOK_SPLIT) {
        tok_cursor c = {.s = s, .n = n};
        while (st->kind == TOK_ADDED ? tok_next_added(e, st, &c) : tok_next_split(e, st, &c)) {
            if (c.id < 0) tok_run(e, step + 1, s + c.lo, c.hi - c.lo, first && c.lo == 0);
            else if (!e->counts) tok_push(t->ctx, e->out, c.id);
        }
        return;
    }
    char *changed = tok_transform(e, st, s, &n, first);
    tok_run(e, step + 1, changed ? changed : s, n, first);
    mem_free(changed);
}

/* Opens and closes the state of a call. A call that fails gives all of it back. */
static tok_enc tok_begin(rlhf_tokenizer *t, tok_ids *out) {
    tok_enc e = {.t = t, .out = out};
    e.heap.ctx = e.scratch.ctx = t->ctx;
    e.md = pcre2_match_data_create(1, t->pcre);
    if (!e.md) err_throw(t->ctx, RLHF_ERR_MEMORY, "out of memory for a match");
    return e;
}

/* Gives back what tok_begin and the call took; the ids are the caller's. */
static void tok_end(tok_enc *e) {
    pcre2_match_data_free(e->md);
    mem_free(e->symbols);
    mem_free(e->heap.e);
    mem_free(e->scratch.p);
}

/* Encodes one text, as UTF-8 or made so. Indices of symbols are 32-bit, hence the limit. */
static void tok_feed(tok_enc *e, const char *text, size_t len) {
    if (len > INT_MAX / 4) err_throw(e->t->ctx, RLHF_ERR_ARG, "a text of more than 512 MiB");
    char *fixed = tok_lossy(e->t->ctx, text, &len);
    tok_run(e, 0, fixed ? fixed : text, len, 1);
    mem_free(fixed);
}

/* Appends the ids of len bytes of text to *out. add_special: with those of the post-processor (a
 * beginning-of-text token); a rendered conversation has its own and is encoded without. Special
 * tokens that are written out in the text are recognised in either case. */
static void tok_encode(rlhf_tokenizer *t, const char *text, size_t len, int add_special,
                       tok_ids *out) {
    tok_enc e = tok_begin(t, out);
    for (int i = 0; add_special && i < (int)stbds_arrlen(t->before); i++)
        tok_push(t->ctx, out, t->before[i]);
    tok_feed(&e, text, len);
    for (int i = 0; add_special && i < (int)stbds_arrlen(t->after); i++)
        tok_push(t->ctx, out, t->after[i]);
    tok_end(&e);
}

/* ---- decoding ---- */

/* Strings one after the other; string i ends at end[i]. */
typedef struct tok_list {
    tok_buf text;
    size_t *end;
    size_t n, cap;
} tok_list;

/* Ends a string: the bytes put since the last one. */
static void tok_list_end(tok_list *l) {
    if (l->n == l->cap) {
        l->cap = l->cap ? 2 * l->cap : 64;
        l->end = mem_realloc(l->text.ctx, l->end, base_mul(l->text.ctx, l->cap, sizeof *l->end));
    }
    l->end[l->n++] = l->text.n;
}

/* The bytes that a token's characters stand for, or the token itself if one stands for none. */
static void tok_put_bytes(const rlhf_tokenizer *t, tok_buf *b, const char *s, size_t n) {
    size_t start = b->n;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        i += (size_t)tok_char(s + i, n - i, &cp);
        if (cp >= TOK_BYTE_CPS || t->cp_byte[cp] < 0) {
            b->n = start;
            tok_put(b, s, n);
            return;
        }
        char byte = (char)t->cp_byte[cp];
        tok_put(b, &byte, 1);
    }
}

/* The value of a "<0xHH>" token, or -1. */
static int tok_byte_token(const char *s, size_t n) {
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>') return -1;
    int v = 0;
    for (int i = 3; i < 5; i++) {
        int c = s[i], d = c >= '0' && c <= '9'   ? c - '0'
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                                 : -1;
        if (d < 0) return -1;
        v = v * 16 + d;
    }
    return v;
}

/* A run of byte tokens: its text if it is UTF-8 as a whole, else U+FFFD for each byte. */
static void tok_flush_bytes(tok_list *to, tok_buf *run) {
    size_t n = run->n;
    if (n == 0) return;
    char *bad = tok_lossy(run->ctx, run->p, &n);
    if (!bad) tok_put(&to->text, run->p, run->n);
    for (size_t i = 0; bad && i < run->n; i++) {
        tok_put(&to->text, "\xEF\xBF\xBD", 3);
        if (i + 1 < run->n) tok_list_end(to);
    }
    tok_list_end(to);
    mem_free(bad);
    run->n = 0;
}

/* Cuts st->text off both ends of a token. */
static void tok_put_stripped(tok_list *to, const tok_step *st, const char *s, size_t n) {
    size_t k = st->len;
    for (int i = 0; i < st->mode && n >= k && memcmp(s, st->text, k) == 0; i++) {
        s += k;
        n -= k;
    }
    for (int i = 0; i < st->flag && n >= k && memcmp(s + n - k, st->text, k) == 0; i++) n -= k;
    tok_put(&to->text, s, n);
}

/* One token without its visible spaces. */
static void tok_put_spaced(tok_list *to, const tok_step *st, const char *s, size_t n, int first) {
    for (size_t i = 0; i < n; i++) {
        if (n - i < st->len || memcmp(s + i, st->text, st->len) != 0) {
            tok_put(&to->text, s + i, 1);
            continue;
        }
        if (!first || !st->mode) tok_put(&to->text, " ", 1);
        i += st->len - 1;
    }
}

/* One decoder step: the tokens of `from` into `to`. */
static void tok_decode_step(tok_enc *e, const tok_step *st, const tok_list *from, tok_list *to) {
    tok_buf run = {e->t->ctx, NULL, 0, 0};
    int fuses = st->kind == TOK_BYTES || st->kind == TOK_FUSE;
    for (size_t i = 0; i < from->n; i++) {
        size_t lo = i ? from->end[i - 1] : 0, n = from->end[i] - lo;
        const char *s = from->text.p ? from->text.p + lo : "";
        int byte = st->kind == TOK_FALLBACK ? tok_byte_token(s, n) : -1;
        if (byte >= 0) {
            char c = (char)byte;
            tok_put(&run, &c, 1);
            continue;
        }
        /* Anything but a byte token ends a run of them. */
        tok_flush_bytes(to, &run);
        if (st->kind == TOK_BYTES) tok_put_bytes(e->t, &to->text, s, n);
        else if (st->kind == TOK_STRIP) tok_put_stripped(to, st, s, n);
        else if (st->kind == TOK_METASPACE) tok_put_spaced(to, st, s, n, i == 0);
        else {
            char *changed = st->kind == TOK_REPLACE ? tok_transform(e, st, s, &n, 0) : NULL;
            tok_put(&to->text, changed ? changed : s, n);
            mem_free(changed);
        }
        if (!fuses) tok_list_end(to);
    }
    tok_flush_bytes(to, &run);
    mem_free(run.p);
    /* Bytes of one character may come from several tokens: UTF-8 is checked when all are
     * together. */
    if (!fuses) return;
    size_t n = to->text.n;
    char *fixed = st->kind == TOK_BYTES && n ? tok_lossy(e->t->ctx, to->text.p, &n) : NULL;
    if (fixed) {
        mem_free(to->text.p);
        to->text = (tok_buf){e->t->ctx, fixed, n, n};
    }
    tok_list_end(to);
}

/* The text of n ids, a block of *len bytes and a NUL. Bytes that are not UTF-8 come out as U+FFFD,
 * as in the reference; an id beyond the vocabulary is an error. skip_special: without special
 * tokens. */
static char *tok_decode(rlhf_tokenizer *t, const int32_t *ids, int n, int skip_special,
                        size_t *len) {
    tok_enc e = tok_begin(t, NULL);
    tok_list list = {.text.ctx = t->ctx}, next = list;
    int decoders = (int)stbds_arrlen(t->decoders);
    for (int i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= t->vocab_size)
            err_throw(t->ctx, RLHF_ERR_ARG, "token id %d is out of range 0..%d", (int)ids[i],
                      t->vocab_size - 1);
        const tok_piece *p = &t->pieces[ids[i]];
        if (!p->text || (skip_special && p->special)) continue;
        if (!decoders && list.n) tok_put(&list.text, " ", 1);
        tok_put(&list.text, p->text, (size_t)p->len);
        tok_list_end(&list);
    }
    /* The steps pass the list back and forth between two buffers. */
    for (int i = 0; i < decoders; i++) {
        tok_decode_step(&e, &t->decoders[i], &list, &next);
        tok_list swap = list;
        list = next;
        next = swap;
        next.n = next.text.n = 0;
    }
    tok_put(&list.text, "", 0);
    mem_free(next.text.p);
    mem_free(next.end);
    mem_free(list.end);
    tok_end(&e);
    if (len) *len = list.text.n;
    return list.text.p;
}

/* ============================================================================================
 * MARK: - 14 VOCAB (tok_)
 * Where a tokenizer comes from and goes to: tokenizer.json flattened into the steps of 13, files
 * out, and the training of a byte-level BPE.
 *
 * Readers append steps in the order in which the reference applies them; each names the key of what
 * it does not know. The two usual kinds become, in the terms of 13,
 *     GPT-2        ADDED(0) ADDED(1) SPLIT(GPT-2's pattern), words of bytes; decoder BYTES
 *     Llama 2      ADDED(0) PREFIX(always) REPLACE(space) ADDED(1), words of characters; decoders
 *                  REPLACE FALLBACK FUSE STRIP
 * A tokenizer owns the texts of its files and writes them back unchanged, so that saving loses
 * nothing that is not understood here.
 *
 * Entry: tok_open, tok_parse, tok_train, tok_save.
 * Tests: test/test_tok.c
 * ============================================================================================ */

/* ---- opening ---- */

/* Frees a list of steps; their texts belong to the tokenizer. */
static void tok_free_steps(tok_step *steps) {
    for (int i = 0; i < (int)stbds_arrlen(steps); i++) pcre2_code_free(steps[i].re);
    stbds_arrfree(steps);
}

/* Gives back a tokenizer in any state of construction. */
static void tok_free(void *tokenizer) {
    rlhf_tokenizer *t = tokenizer;
    if (!t) return;
    tok_free_steps(t->steps);
    tok_free_steps(t->decoders);
    for (int i = 0; i < (int)stbds_arrlen(t->texts); i++) mem_free(t->texts[i]);
    stbds_arrfree(t->texts);
    stbds_arrfree(t->added);
    stbds_arrfree(t->before);
    stbds_arrfree(t->after);
    stbds_shfree(t->words);
    stbds_hmfree(t->chars);
    stbds_hmfree(t->ranks);
    mem_free(t->rules);
    mem_free(t->pieces);
    mem_free(t->blob);
    mem_free(t->cache);
    mem_free(t->json);
    mem_free(t->config);
    mem_free(t->jinja);
    pcre2_general_context_free(t->pcre);
    mem_free(t);
}

/* Throws RLHF_ERR_UNSUPPORTED about a key's value. */
__attribute__((noreturn)) static void tok_unsupported(const json_src *src, const char *key,
                                                      const json_t *value) {
    char text[80];
    err_throw(src->ctx, RLHF_ERR_UNSUPPORTED, "%s: key \"%s%s\": %s is not supported", src->file,
              src->at, key, json_show(value, text, sizeof text));
}

/* A copy of a string that lives as long as the tokenizer. */
static const char *tok_keep(rlhf_tokenizer *t, const char *s, size_t n) {
    stbds_arrput(t->texts, NULL);
    char *copy = mem_strndup(t->ctx, s, n);
    stbds_arrlast(t->texts) = copy;
    return copy;
}

/* Appends a step. The pointer is good until the next one is appended. */
static tok_step *tok_add_step(tok_step **steps, int kind, int mode, int flag) {
    if (stbds_arrlen(*steps) >= TOK_MAX_STEPS)
        err_throw(base_current, RLHF_ERR_UNSUPPORTED, "more than %d normalizers and pre-tokenizers",
                  (int)TOK_MAX_STEPS);
    stbds_arrput(*steps, ((tok_step){.kind = kind, .mode = mode, .flag = flag, .text = ""}));
    return &stbds_arrlast(*steps);
}

/* Gives a step its text, a copy. */
static void tok_step_text(rlhf_tokenizer *t, tok_step *st, const char *s) {
    st->len = strlen(s);
    st->text = tok_keep(t, s, st->len);
}

/* "pattern": {"String": ...} or {"Regex": ...}. */
static void tok_step_pattern(rlhf_tokenizer *t, const json_src *src, tok_step *st,
                             const json_t *v) {
    const json_t *pattern = json_need_object(src, v, "pattern");
    const char *literal = json_opt_str(src, pattern, "String", NULL);
    const char *s = literal ? literal : json_need_str(src, pattern, "Regex");
    st->re = tok_compile(t, src, s, strlen(s), literal != NULL);
    tok_step_text(t, st, s);
}

/* Index of name in a null-terminated list, or -1. */
static int tok_choice(const char *name, const char *const *names) {
    for (int i = 0; names[i]; i++)
        if (strcmp(name, names[i]) == 0) return i;
    return -1;
}

/* "normalizer": unicode normal forms, Prepend, Replace, and lists of them; null is none. */
static void tok_load_normalizer(rlhf_tokenizer *t, const json_src *src, const json_t *v) {
    static const char *const forms[] = {"NFC", "NFD", "NFKC", "NFKD", NULL};
    static const int options[] = {UTF8PROC_STABLE | UTF8PROC_COMPOSE,
                                  UTF8PROC_STABLE | UTF8PROC_DECOMPOSE,
                                  UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
                                  UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT};
    /* utf8proc's options; STABLE forbids compositions that later Unicode versions brought. */
    if (!v) return;
    const char *type = json_need_str(src, v, "type");
    int form = tok_choice(type, forms);
    if (form >= 0) {
        tok_add_step(&t->steps, TOK_UNICODE, options[form], 0);
    } else if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_need_array(src, v, "normalizers");
        for (size_t i = 0; i < json_array_size(list); i++)
            tok_load_normalizer(t, src, json_array_get(list, i));
    } else if (strcmp(type, "Prepend") == 0) {
        tok_step *st = tok_add_step(&t->steps, TOK_PREFIX, TOK_ALWAYS, 0);
        tok_step_text(t, st, json_need_str(src, v, "prepend"));
    } else if (strcmp(type, "Replace") == 0) {
        tok_step *st = tok_add_step(&t->steps, TOK_REPLACE, 0, 0);
        tok_step_pattern(t, src, st, v);
        tok_step_text(t, st, json_need_str(src, v, "content"));
    } else tok_unsupported(src, "type", json_get(v, "type"));
}

/* prepend_scheme of Metaspace, or what older files say with add_prefix_space. */
static const char *tok_scheme(const json_src *src, const json_t *v) {
    int prefix = json_opt_bool(src, v, "add_prefix_space", 1);
    return json_opt_str(src, v, "prepend_scheme", prefix ? "always" : "never");
}

/* Metaspace: spaces become the replacement, one is put in front, words begin at each. */
static void tok_load_metaspace(rlhf_tokenizer *t, const json_src *src, const json_t *v) {
    static const char *const schemes[] = {"always", "first", "never", NULL};
    const char *mark = json_need_str(src, v, "replacement");
    int scheme = tok_choice(tok_scheme(src, v), schemes);
    if (scheme < 0) tok_unsupported(src, "prepend_scheme", json_get(v, "prepend_scheme"));
    tok_step *st = tok_add_step(&t->steps, TOK_REPLACE, 0, 0);
    st->re = tok_compile(t, src, " ", 1, 1);
    tok_step_text(t, st, mark);
    if (scheme < 2) {
        st = tok_add_step(&t->steps, TOK_PREFIX, scheme == 0 ? TOK_UNLESS : TOK_FIRST, 0);
        tok_step_text(t, st, mark);
    }
    if (json_opt_bool(src, v, "split", 1)) {
        st = tok_add_step(&t->steps, TOK_SPLIT, TOK_WITH_NEXT, 0);
        st->re = tok_compile(t, src, mark, strlen(mark), 1);
    }
}

/* "pre_tokenizer": ByteLevel, Split, Digits, Metaspace, and lists of them. */
static void tok_load_pre(rlhf_tokenizer *t, const json_src *src, const json_t *v) {
    static const char *const behaviors[] = {"Isolated",           "Removed",        "Contiguous",
                                            "MergedWithPrevious", "MergedWithNext", NULL};
    if (!v) return;
    const char *type = json_need_str(src, v, "type");
    /* What follows ByteLevel would see the characters that stand for bytes. */
    if (t->byte_level) tok_unsupported(src, "type (after ByteLevel)", json_get(v, "type"));
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_need_array(src, v, "pretokenizers");
        for (size_t i = 0; i < json_array_size(list); i++)
            tok_load_pre(t, src, json_array_get(list, i));
    } else if (strcmp(type, "ByteLevel") == 0) {
        t->byte_level = 1;
        if (json_opt_bool(src, v, "add_prefix_space", 1))
            tok_step_text(t, tok_add_step(&t->steps, TOK_PREFIX, TOK_UNLESS, 0), " ");
        if (!json_opt_bool(src, v, "use_regex", 1)) return;
        tok_step *st = tok_add_step(&t->steps, TOK_SPLIT, TOK_ISOLATED, 0);
        st->re = tok_compile(t, src, TOK_GPT2_PATTERN, sizeof TOK_GPT2_PATTERN - 1, 0);
        st->text = TOK_GPT2_PATTERN;
    } else if (strcmp(type, "Split") == 0) {
        int behavior = tok_choice(json_need_str(src, v, "behavior"), behaviors);
        if (behavior < 0) tok_unsupported(src, "behavior", json_get(v, "behavior"));
        int invert = json_opt_bool(src, v, "invert", 0);
        tok_step_pattern(t, src, tok_add_step(&t->steps, TOK_SPLIT, behavior, invert), v);
    } else if (strcmp(type, "Digits") == 0) {
        int mode = json_opt_bool(src, v, "individual_digits", 0) ? TOK_ISOLATED : TOK_CONTIGUOUS;
        tok_step *st = tok_add_step(&t->steps, TOK_SPLIT, mode, 0);
        st->re = tok_compile(t, src, TOK_DIGIT_PATTERN, sizeof TOK_DIGIT_PATTERN - 1, 0);
        st->text = TOK_DIGIT_PATTERN;
    } else if (strcmp(type, "Metaspace") == 0) tok_load_metaspace(t, src, v);
    else tok_unsupported(src, "type", json_get(v, "type"));
}

/* "decoder": the steps from tokens back to text. */
static void tok_load_decoder(rlhf_tokenizer *t, const json_src *src, const json_t *v) {
    if (!v) return;
    const char *type = json_need_str(src, v, "type");
    tok_step *st;
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_need_array(src, v, "decoders");
        for (size_t i = 0; i < json_array_size(list); i++)
            tok_load_decoder(t, src, json_array_get(list, i));
    } else if (strcmp(type, "ByteLevel") == 0) tok_add_step(&t->decoders, TOK_BYTES, 0, 0);
    else if (strcmp(type, "ByteFallback") == 0) tok_add_step(&t->decoders, TOK_FALLBACK, 0, 0);
    else if (strcmp(type, "Fuse") == 0) tok_add_step(&t->decoders, TOK_FUSE, 0, 0);
    else if (strcmp(type, "Replace") == 0) {
        st = tok_add_step(&t->decoders, TOK_REPLACE, 0, 0);
        tok_step_pattern(t, src, st, v);
        tok_step_text(t, st, json_need_str(src, v, "content"));
    } else if (strcmp(type, "Strip") == 0) {
        int start = (int)json_need_int(src, v, "start", 0, INT_MAX);
        int stop = (int)json_need_int(src, v, "stop", 0, INT_MAX);
        st = tok_add_step(&t->decoders, TOK_STRIP, start, stop);
        tok_step_text(t, st, json_need_str(src, v, "content"));
        if (!st->len) json_bad(src, "content", json_get(v, "content"), "one character");
    } else if (strcmp(type, "Metaspace") == 0) {
        int drop = strcmp(tok_scheme(src, v), "never") != 0;
        st = tok_add_step(&t->decoders, TOK_METASPACE, drop, 0);
        tok_step_text(t, st, json_need_str(src, v, "replacement"));
        if (!st->len) json_bad(src, "replacement", json_get(v, "replacement"), "one character");
    } else tok_unsupported(src, "type", json_get(v, "type"));
}

/* TemplateProcessing: the ids around the text in "single". */
static void tok_load_template(rlhf_tokenizer *t, const json_src *src, const json_t *v) {
    const json_t *single = json_need_array(src, v, "single");
    const json_t *specials = json_need_object(src, v, "special_tokens");
    int seen = 0, at = 0;
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *item = json_array_get(single, i);
        if (json_get(item, "Sequence")) {
            if (seen++) tok_unsupported(src, "single (the text twice)", single);
            continue;
        }
        const json_t *special = json_need_object(src, item, "SpecialToken");
        const json_t *known = json_need_object(src, specials, json_need_str(src, special, "id"));
        const json_t *ids = json_need_array(src, known, "ids");
        for (size_t k = 0; k < json_array_size(ids); k++) {
            const json_t *id = json_array_get(ids, k);
            if (!json_is_integer(id) || json_integer_value(id) < 0 ||
                json_integer_value(id) >= t->vocab_size)
                json_bad(src, "ids", id, "an id of the vocabulary");
            /* A later template of a Sequence stands outside an earlier one. */
            if (seen) stbds_arrput(t->after, (int32_t)json_integer_value(id));
            else {
                stbds_arrins(t->before, at, (int32_t)json_integer_value(id));
                at++;
            }
        }
    }
    if (!seen) tok_unsupported(src, "single (without the text)", single);
}

/* "post_processor": what add_special adds. */
static void tok_load_post(rlhf_tokenizer *t, const json_src *src, const json_t *v) {
    if (!v) return;
    const char *type = json_need_str(src, v, "type");
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_need_array(src, v, "processors");
        for (size_t i = 0; i < json_array_size(list); i++)
            tok_load_post(t, src, json_array_get(list, i));
    } else if (strcmp(type, "TemplateProcessing") == 0) tok_load_template(t, src, v);
    /* ByteLevel changes offsets only. */
    else if (strcmp(type, "ByteLevel") != 0) tok_unsupported(src, "type", json_get(v, "type"));
}

/* Makes an id known. An added token takes the place of a piece with its id. */
static void tok_set_piece(rlhf_tokenizer *t, int64_t id, const char *text, size_t len,
                          int special) {
    t->pieces[id] = (tok_piece){text, (int)len, special};
}

/* An id of an entry of the vocabulary or of the added tokens. */
static int64_t tok_read_id(const json_src *src, const char *key, const json_t *id) {
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= TOK_MAX_ID)
        json_bad(src, key, id, "a token id");
    return json_integer_value(id);
}

/* Ids and texts of the model's pieces and of the added tokens. */
static void tok_load_vocab(rlhf_tokenizer *t, const json_src *src, json_t *vocab, json_t *added) {
    const char *key;
    json_t *id;
    size_t bytes = 0, len;
    int64_t top = -1;
    json_object_foreach(vocab, key, id) {
        int64_t v = tok_read_id(src, "vocab", id);
        if (v > top) top = v;
        bytes += strlen(key) + 1;
    }
    /* Added tokens may lie beyond the model's vocabulary. */
    json_src at = *src;
    at.at = "added_tokens.";
    for (size_t i = 0; i < json_array_size(added); i++) {
        int64_t v = tok_read_id(&at, "id", json_get(json_array_get(added, i), "id"));
        if (v > top) top = v;
    }
    t->vocab_size = (int)top + 1;
    if (!t->vocab_size) json_bad(src, "vocab", vocab, "a vocabulary that is not empty");
    t->pieces = mem_zalloc(t->ctx, (size_t)t->vocab_size, sizeof *t->pieces);
    /* One block for all texts; the tables point into it. */
    char *p = t->blob = mem_alloc(t->ctx, bytes);
    json_object_foreach(vocab, key, id) {
        len = strlen(key);
        memcpy(p, key, len + 1);
        tok_set_piece(t, json_integer_value(id), p, len, 0);
        stbds_shput(t->words, p, (int32_t)json_integer_value(id));
        if (len > (size_t)t->longest) t->longest = (int)len;
        uint32_t cp = 0;
        if (len && (size_t)tok_char(p, len, &cp) == len)
            stbds_hmput(t->chars, cp, (int32_t)json_integer_value(id));
        p += len + 1;
    }
    /* Looking up in a null map would make one, during a later call. */
    if (!t->chars) stbds_hmput(t->chars, 0x110000, -1);
    if (!t->words) stbds_shput(t->words, "", -1);
}

/* The id of a piece of the model, or -1. */
static int32_t tok_piece_id(rlhf_tokenizer *t, const char *text) {
    ptrdiff_t k = stbds_shgeti(t->words, text);
    return k < 0 ? -1 : t->words[k].value;
}

/* Merges in order of rank, as "a b" or ["a", "b"]. */
static void tok_load_merges(rlhf_tokenizer *t, const json_src *src, const json_t *merges) {
    size_t n = json_array_size(merges);
    t->rules = mem_alloc(t->ctx, base_mul(t->ctx, n ? n : 1, sizeof *t->rules));
    t->n_rules = (int)n;
    tok_buf b = {t->ctx, NULL, 0, 0};
    for (size_t i = 0; i < n; i++) {
        const json_t *m = json_array_get(merges, i);
        /* Either form; a piece may hold spaces in the second only. */
        const char *left = json_string_value(json_array_get(m, 0));
        const char *right = json_string_value(json_array_get(m, 1)), *space = NULL;
        b.n = 0;
        if (json_is_string(m) && (space = strchr(json_string_value(m), ' '))) {
            left = json_string_value(m);
            right = space + 1;
        }
        if (!left || !right || (!space && json_array_size(m) != 2))
            json_bad(src, "merges", m, "\"a b\" or [\"a\", \"b\"]");
        size_t n_left = space ? (size_t)(space - left) : strlen(left);
        tok_put(&b, left, n_left);
        int32_t l = tok_piece_id(t, b.p);
        tok_put(&b, right, strlen(right));
        tok_rule r = {l, tok_piece_id(t, right), tok_piece_id(t, b.p)};
        if (r.left < 0 || r.right < 0 || r.id < 0)
            err_throw(t->ctx, src->status,
                      "%s: key \"model.merges\", number %zu: \"%.*s\" + \"%s\" is not in the "
                      "vocabulary",
                      src->file, i, (int)n_left, left, right);
        t->rules[i] = r;
        stbds_hmput(t->ranks, tok_pair(r.left, r.right), (int32_t)i);
    }
    mem_free(b.p);
    if (!t->ranks) stbds_hmput(t->ranks, (uint64_t)1 << 62, -1);
}

/* Ids of single bytes, and whether words can be merged apart from each other (tok_words). */
static void tok_index_bytes(rlhf_tokenizer *t) {
    int next = 256;
    for (int i = 0; i < TOK_BYTE_CPS; i++) t->cp_byte[i] = -1;
    /* GPT-2's alphabet: printable bytes stand for themselves, the others are numbered from 256. */
    for (int i = 0; i < 256; i++) {
        int printable = (i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174;
        t->byte_cp[i] = (uint16_t)(printable ? i : next++);
        t->cp_byte[t->byte_cp[i]] = (int16_t)i;
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned)i);
        t->byte_id[i] = t->byte_level ? tok_char_piece(t, t->byte_cp[i]) : tok_piece_id(t, name);
    }
    t->cut = !t->byte_level && !t->ignore_merges && tok_char_piece(t, 0x2581) >= 0;
    /* A merge that puts a visible space behind anything but one reaches across words. */
    for (ptrdiff_t i = 0; t->cut && i < stbds_hmlen(t->ranks); i++) {
        if (t->ranks[i].value < 0) continue;
        const tok_rule *r = &t->rules[t->ranks[i].value];
        const tok_piece *a = &t->pieces[r->left], *b = &t->pieces[r->right];
        int space_before = a->len >= 3 && memcmp(a->text + a->len - 3, TOK_SPACE, 3) == 0;
        if (!space_before && b->len >= 3 && memcmp(b->text, TOK_SPACE, 3) == 0) t->cut = 0;
    }
}

/* "model": flags, vocabulary, merges, unknown token; BPE without dropout and affixes. */
static void tok_load_model(rlhf_tokenizer *t, const json_src *src, json_t *root) {
    json_src at = *src;
    json_t *model = json_need_object(src, root, "model");
    at.at = "model.";
    const char *type = json_opt_str(&at, model, "type", "BPE");
    if (strcmp(type, "BPE") != 0) tok_unsupported(&at, "type", json_get(model, "type"));
    if (json_opt_real(&at, model, "dropout", 0) != 0)
        tok_unsupported(&at, "dropout", json_get(model, "dropout"));
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (int i = 0; i < 2; i++)
        if (*json_opt_str(&at, model, affixes[i], ""))
            tok_unsupported(&at, affixes[i], json_get(model, affixes[i]));
    /* Flags that steer tok_symbolize and tok_word. */
    t->fuse_unk = json_opt_bool(&at, model, "fuse_unk", 0);
    t->ignore_merges = json_opt_bool(&at, model, "ignore_merges", 0);
    t->byte_fallback = json_opt_bool(&at, model, "byte_fallback", 0);
    tok_load_vocab(t, &at, json_need_object(&at, model, "vocab"),
                   json_opt_array(src, root, "added_tokens"));
    tok_load_merges(t, &at, json_need_array(&at, model, "merges"));
    const char *unk = json_opt_str(&at, model, "unk_token", NULL);
    t->unk = unk ? tok_piece_id(t, unk) : -1;
    if (unk && t->unk < 0) json_bad(&at, "unk_token", json_get(model, "unk_token"), "a piece");
}

/* Those matched as written first, then by first byte, then longest first. */
static int tok_compare_added(const void *a, const void *b) {
    const tok_added *x = a, *y = b;
    if (x->normalized != y->normalized) return x->normalized - y->normalized;
    int c = (unsigned char)x->text[0] - (unsigned char)y->text[0];
    if (c) return c;
    if (x->len != y->len) return x->len > y->len ? -1 : 1;
    return x->id - y->id;
}

/* Added tokens. The text of a normalized one is looked for in its normalized form, which the steps
 * so far (the normalizer's) make, and decodes to that. */
static void tok_load_added(rlhf_tokenizer *t, const json_src *src, const json_t *list) {
    json_src at = *src;
    at.at = "added_tokens.";
    tok_enc e = tok_begin(t, NULL);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const char *text = json_need_str(&at, v, "content");
        size_t len = strlen(text);
        tok_added a = {.id = (int32_t)json_need_int(&at, v, "id", 0, TOK_MAX_ID)};
        a.single_word = json_opt_bool(&at, v, "single_word", 0);
        a.lstrip = json_opt_bool(&at, v, "lstrip", 0);
        a.rstrip = json_opt_bool(&at, v, "rstrip", 0);
        int special = json_opt_bool(&at, v, "special", 0);
        a.normalized = json_opt_bool(&at, v, "normalized", !special);
        a.content = a.text = tok_keep(t, text, len);
        for (int k = 1; a.normalized && k < (int)stbds_arrlen(t->steps); k++) {
            char *changed = tok_transform(&e, &t->steps[k], a.text, &len, 1);
            if (changed) a.text = tok_keep(t, changed, len);
            mem_free(changed);
        }
        a.len = len;
        tok_set_piece(t, a.id, a.text, len, special);
        if (len) stbds_arrput(t->added, a);
    }
    tok_end(&e);
    /* bucket[set][b] is where first byte b begins, so that one comparison rules most bytes out. */
    int n = (int)stbds_arrlen(t->added), k = 0;
    if (n) qsort(t->added, (size_t)n, sizeof *t->added, tok_compare_added);
    for (int set = 0; set < 2; set++)
        for (int b = 0; b <= 256; b++) {
            const tok_added *a = t->added;
            while (k < n && a[k].normalized == set && (unsigned char)a[k].text[0] < b) k++;
            t->bucket[set][b] = k;
        }
}

/* The id of a token of any kind, or -1. */
static int tok_find(rlhf_tokenizer *t, const char *text) {
    for (int i = 0; i < (int)stbds_arrlen(t->added); i++)
        if (strcmp(t->added[i].content, text) == 0) return t->added[i].id;
    return tok_piece_id(t, text);
}

/* A special token of tokenizer_config.json, a string or an object with "content"; else the first of
 * some usual names. */
static int tok_special(rlhf_tokenizer *t, const json_src *src, const json_t *config,
                       const char *key, const char *const *usual) {
    const json_t *v = json_get(config, key);
    const char *name =
        json_is_object(v) ? json_need_str(src, v, "content") : json_opt_str(src, config, key, NULL);
    /* A config that says null means that there is none. */
    if (!name && json_object_get(config, key)) return -1;
    if (name) return tok_find(t, name);
    for (int i = 0; usual[i]; i++) {
        int id = tok_find(t, usual[i]);
        if (id >= 0) return id;
    }
    return -1;
}

/* ---- files ---- */

/* tokenizer_config.json and chat_template.jinja, as far as they matter here. */
static void tok_load_config(rlhf_tokenizer *t, const char *file) {
    static const char *const eos[] = {TOK_END_OF_TEXT, "</s>", "<|end_of_text|>", NULL};
    static const char *const bos[] = {TOK_END_OF_TEXT, "<s>", "<|begin_of_text|>", NULL};
    json_src src = json_source(t->ctx, file);
    json_t *config = t->config ? json_parse(&src, t->config, t->config_len) : NULL;
    t->eos = tok_special(t, &src, config, "eos_token", eos);
    t->bos = tok_special(t, &src, config, "bos_token", bos);
    /* The template's own file counts first, then the config's text, then its list's default. */
    const char *jinja = t->jinja;
    const json_t *v = json_get(config, "chat_template");
    if (!jinja && json_is_string(v)) jinja = json_string_value(v);
    for (size_t i = 0; !jinja && i < json_array_size(v); i++) {
        const json_t *one = json_array_get(v, i);
        if (strcmp(json_opt_str(&src, one, "name", ""), "default") == 0)
            jinja = json_opt_str(&src, one, "template", NULL);
    }
    t->chat_template = jinja && *jinja ? tok_keep(t, jinja, strlen(jinja)) : NULL;
    if (config) err_release(t->ctx);
}

/* A tokenizer from the texts of its files, whose ownership it takes; config and jinja may be null.
 * file and config_file stand in messages. */
static rlhf_tokenizer *tok_parse(rlhf_ctx *ctx, const char *file, const char *config_file,
                                 rlhf_tokenizer texts) {
    rlhf_tokenizer *t = mem_alloc(ctx, sizeof *t);
    *t = texts;
    t->ctx = ctx;
    err_defer(ctx, tok_free, t);
    t->pcre = pcre2_general_context_create(tok_pcre_alloc, tok_pcre_free, ctx);
    if (!t->pcre) err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for pcre2");
    t->cache = mem_zalloc(ctx, TOK_CACHE, sizeof *t->cache);
    json_src src = json_source(ctx, file), at = src;
    json_t *root = json_parse(&src, t->json, t->json_len);
    if (!json_is_object(root)) json_bad(&src, "model", NULL, "a tokenizer.json");
    /* Order matters: normalized added tokens need the vocabulary and the normalizer's steps, but
     * not the pre-tokenizer's. */
    tok_load_model(t, &src, root);
    tok_add_step(&t->steps, TOK_ADDED, 0, 0);
    at.at = "normalizer.";
    tok_load_normalizer(t, &at, json_opt_object(&src, root, "normalizer"));
    tok_load_added(t, &src, json_opt_array(&src, root, "added_tokens"));
    tok_add_step(&t->steps, TOK_ADDED, 1, 0);
    at.at = "pre_tokenizer.";
    tok_load_pre(t, &at, json_opt_object(&src, root, "pre_tokenizer"));
    at.at = "post_processor.";
    tok_load_post(t, &at, json_opt_object(&src, root, "post_processor"));
    at.at = "decoder.";
    tok_load_decoder(t, &at, json_opt_object(&src, root, "decoder"));
    err_release(ctx);
    tok_index_bytes(t);
    tok_load_config(t, config_file);
    err_keep(ctx);
    return t;
}

/* Opens a directory with a tokenizer.json, or such a file by its path. */
static rlhf_tokenizer *tok_open(rlhf_ctx *ctx, const char *path) {
    const char *slash = strrchr(path, '/');
    int is_dir = io_is_dir(path);
    char *dir = is_dir ? mem_strdup(ctx, path)
                       : mem_strndup(ctx, path, slash ? (size_t)(slash - path) + 1 : 0);
    char *file = is_dir ? io_join(ctx, dir, "tokenizer.json") : mem_strdup(ctx, path);
    char *config = io_join(ctx, dir, "tokenizer_config.json");
    char *jinja = io_join(ctx, dir, "chat_template.jinja");
    rlhf_tokenizer texts = {0};
    texts.json = io_read(ctx, file, IO_LIMIT, &texts.json_len);
    if (io_exists(config)) texts.config = io_read(ctx, config, IO_LIMIT, &texts.config_len);
    if (io_exists(jinja)) texts.jinja = io_read(ctx, jinja, IO_LIMIT, &texts.jinja_len);
    rlhf_tokenizer *t = tok_parse(ctx, file, config, texts);
    mem_free(dir);
    mem_free(file);
    mem_free(config);
    mem_free(jinja);
    return t;
}

/* Writes the files as they were read or made. */
static void tok_save(rlhf_tokenizer *t, const char *dir) {
    const char *names[] = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"};
    const char *texts[] = {t->json, t->config, t->jinja};
    size_t sizes[] = {t->json_len, t->config_len, t->jinja_len};
    io_mkdirs(t->ctx, dir);
    for (int i = 0; i < 3; i++) {
        if (!texts[i]) continue;
        char *path = io_join(t->ctx, dir, names[i]);
        io_write_file(t->ctx, path, texts[i], sizes[i]);
        mem_free(path);
    }
}

/* ---- training ---- */

/* A pair of neighbours: how often it occurs, and in which words (some of them more than once, some
 * no longer). */
typedef struct tok_pair_stat {
    int64_t count;
    int32_t *words; /* stb_ds */
    int round;      /* the merge that last made it more frequent */
} tok_pair_stat;
typedef struct tok_pair_entry {
    uint64_t key;
    tok_pair_stat value;
} tok_pair_entry;

/* A distinct word of the training text. */
typedef struct tok_train_word {
    int32_t *ids;
    int n;
    int64_t count;
} tok_train_word;

/* The state of a training: the vocabulary so far, and the words as they are merged by now. */
typedef struct tok_trainer {
    rlhf_ctx *ctx;
    char **texts;         /* stb_ds: id -> text */
    tok_word_id *ids;     /* stb_ds: text -> id */
    int32_t (*merges)[2]; /* stb_ds */
    tok_train_word *words;
    int n_words;
    tok_pair_entry *pairs; /* stb_ds */
    ptrdiff_t *risen;      /* stb_ds: pairs that became more frequent in this round */
    int round;
    tok_heap heap; /* (-count, pair): most frequent first, then the smaller pair of ids */
} tok_trainer;

/* The id of a text, a new one if need be. */
static int32_t tok_train_id(tok_trainer *r, const char *text) {
    ptrdiff_t k = stbds_shgeti(r->ids, text);
    if (k >= 0) return r->ids[k].value;
    int32_t id = (int32_t)stbds_arrlen(r->texts);
    stbds_arrput(r->texts, mem_strdup(r->ctx, text));
    stbds_shput(r->ids, r->texts[id], id);
    return id;
}

/* Counts a pair in word w by delta. */
static void tok_train_add(tok_trainer *r, int32_t left, int32_t right, int w, int64_t delta) {
    uint64_t key = tok_pair(left, right);
    ptrdiff_t k = stbds_hmgeti(r->pairs, key);
    if (k < 0) {
        stbds_hmput(r->pairs, key, ((tok_pair_stat){.round = -1}));
        k = stbds_hmgeti(r->pairs, key);
    }
    tok_pair_stat *p = &r->pairs[k].value;
    p->count += delta;
    if (delta < 0) return;
    if (!stbds_arrlen(p->words) || stbds_arrlast(p->words) != w) stbds_arrput(p->words, w);
    if (p->round == r->round) return;
    p->round = r->round;
    stbds_arrput(r->risen, k);
}

/* Queues what this round made more frequent. */
static void tok_train_queue(tok_trainer *r) {
    for (int i = 0; i < (int)stbds_arrlen(r->risen); i++) {
        const tok_pair_entry *p = &r->pairs[r->risen[i]];
        if (p->value.count >= TOK_MIN_PAIRS)
            tok_heap_push(&r->heap, (tok_entry){UINT64_MAX - (uint64_t)p->value.count, p->key});
    }
    stbds_arrsetlen(r->risen, 0);
    r->round++;
}

/* Replaces each (left, right) in word w by id, and counts what changes around it. */
static void tok_train_merge(tok_trainer *r, int w, int32_t left, int32_t right, int32_t id) {
    tok_train_word *word = &r->words[w];
    int32_t *s = word->ids;
    int k = 0;
    for (int i = 0; i < word->n; i++) {
        if (i + 1 == word->n || s[i] != left || s[i + 1] != right) {
            s[k++] = s[i];
            continue;
        }
        /* The neighbours' pairs lose one occurrence and gain one with the new id. */
        if (k > 0) {
            tok_train_add(r, s[k - 1], left, w, -word->count);
            tok_train_add(r, s[k - 1], id, w, word->count);
        }
        if (i + 2 < word->n) {
            tok_train_add(r, right, s[i + 2], w, -word->count);
            tok_train_add(r, id, s[i + 2], w, word->count);
        }
        s[k++] = id;
        i++;
    }
    word->n = k;
}

/* Merges until there are `most` ids or no pair is frequent enough. Counts in the queue may be out
 * of date: an entry is put back with the true count when it comes up. */
static void tok_train_merges(tok_trainer *r, int most) {
    for (int w = 0; w < r->n_words; w++)
        for (int i = 0; i + 1 < r->words[w].n; i++)
            tok_train_add(r, r->words[w].ids[i], r->words[w].ids[i + 1], w, r->words[w].count);
    tok_train_queue(r);
    tok_buf b = {r->ctx, NULL, 0, 0};
    while ((int)stbds_arrlen(r->texts) < most && r->heap.n) {
        tok_entry top = tok_heap_pop(&r->heap);
        ptrdiff_t k = stbds_hmgeti(r->pairs, top.tie);
        tok_pair_stat *p = &r->pairs[k].value;
        /* Counts only fall after they were queued, except for what tok_train_queue queues again. */
        uint64_t key = UINT64_MAX - (uint64_t)p->count;
        if (p->count < TOK_MIN_PAIRS) continue;
        if (key != top.key) {
            if (key > top.key) tok_heap_push(&r->heap, (tok_entry){key, top.tie});
            continue;
        }
        /* The pair becomes a token; its words, taken off first, are rewritten. */
        int32_t left = (int32_t)(top.tie >> 32), right = (int32_t)(uint32_t)top.tie;
        b.n = 0;
        tok_put(&b, r->texts[left], strlen(r->texts[left]));
        tok_put(&b, r->texts[right], strlen(r->texts[right]));
        int32_t id = tok_train_id(r, b.p), *merge = stbds_arraddnptr(r->merges, 1)[0];
        merge[0] = left;
        merge[1] = right;
        int32_t *words = p->words;
        *p = (tok_pair_stat){.round = -1};
        for (int i = 0; i < (int)stbds_arrlen(words); i++)
            tok_train_merge(r, words[i], left, right, id);
        r->pairs[k].value.count = 0;
        stbds_arrfree(words);
        tok_train_queue(r);
    }
    mem_free(b.p);
}

/* Distinct words and their counts, from the texts. */
static void tok_train_words(tok_trainer *r, rlhf_tokenizer *t, const char *const *texts,
                            const size_t *lens, int n) {
    tok_count *counts = NULL;
    stbds_sh_new_strdup(counts);
    tok_enc e = tok_begin(t, NULL);
    e.counts = &counts;
    for (int i = 0; i < n; i++) tok_feed(&e, texts[i], lens[i]);
    tok_end(&e);
    /* Each word as the ids of its bytes' characters. */
    r->n_words = (int)stbds_shlen(counts);
    r->words = mem_zalloc(r->ctx, (size_t)r->n_words + 1, sizeof *r->words);
    for (int w = 0; w < r->n_words; w++) {
        const char *s = counts[w].key;
        size_t len = strlen(s);
        tok_train_word *word = &r->words[w];
        word->ids = mem_alloc(r->ctx, len * sizeof *word->ids);
        word->count = counts[w].value;
        for (size_t i = 0; i < len;) {
            uint32_t cp;
            i += (size_t)tok_char(s + i, len - i, &cp);
            word->ids[word->n++] = tok_char_piece(t, cp);
        }
    }
    stbds_shfree(counts);
}

/* A call into jansson that can only run out of memory. */
static void tok_must(rlhf_ctx *ctx, int failed) {
    if (failed) err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a JSON value");
}

/* A tokenizer.json of GPT-2's kind: the texts in order of id, then the end-of-text token. */
static char *tok_train_json(tok_trainer *r, size_t *len) {
    static const char format[] =
        "{s:s, s:n, s:n, s:[{s:i, s:s, s:b, s:b, s:b, s:b, s:b}], s:n,"
        " s:{s:s, s:b, s:b, s:b}, s:{s:s, s:b, s:b, s:b}, s:{s:s, s:b, s:b, s:b},"
        " s:{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}}";
    /* The end-of-text token takes the id behind the last merge. */
    int n = (int)stbds_arrlen(r->texts);
    json_t *vocab = json_hold(r->ctx, json_object());
    json_t *merges = json_hold(r->ctx, json_array());
    for (int i = 0; i < n; i++)
        tok_must(r->ctx, json_object_set_new(vocab, r->texts[i], json_integer(i)));
    tok_must(r->ctx, json_object_set_new(vocab, TOK_END_OF_TEXT, json_integer(n)));
    for (int i = 0; i < (int)stbds_arrlen(r->merges); i++) {
        const int32_t *pair = r->merges[i];
        json_t *both = json_pack("[s, s]", r->texts[pair[0]], r->texts[pair[1]]);
        tok_must(r->ctx, json_array_append_new(merges, both));
    }
    json_t *root = json_pack(
        format, "version", "1.0", "truncation", "padding", "added_tokens", "id", n, "content",
        TOK_END_OF_TEXT, "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1,
        "normalizer", "pre_tokenizer", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets",
        1, "use_regex", 1, "post_processor", "type", "ByteLevel", "add_prefix_space", 0,
        "trim_offsets", 1, "use_regex", 1, "decoder", "type", "ByteLevel", "add_prefix_space", 0,
        "trim_offsets", 1, "use_regex", 1, "model", "type", "BPE", "dropout", "unk_token",
        "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0,
        "ignore_merges", 0, "vocab", json_incref(vocab), "merges", json_incref(merges));
    json_hold(r->ctx, root);
    char *text = json_text(r->ctx, root, JSON_INDENT(1), len);
    for (int i = 0; i < 3; i++) err_release(r->ctx);
    return text;
}

/* The tokenizer with r's vocabulary. */
static rlhf_tokenizer *tok_train_result(tok_trainer *r) {
    static const char config[] =
        "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
        "  \"bos_token\": \"" TOK_END_OF_TEXT "\",\n  \"eos_token\": \"" TOK_END_OF_TEXT "\",\n"
        "  \"clean_up_tokenization_spaces\": false\n}\n";
    rlhf_tokenizer texts = {.config_len = sizeof config - 1};
    texts.config = mem_strndup(r->ctx, config, sizeof config - 1);
    texts.json = tok_train_json(r, &texts.json_len);
    return tok_parse(r->ctx, "trained tokenizer", "trained tokenizer", texts);
}

/* Trains byte-level BPE on n texts: ids 0..255 are the bytes in GPT-2's order, then come merges (a
 * pair that occurs once is not merged: a small text may give fewer than vocab_size ids), and the
 * end-of-text token is last. A function of the texts alone; equals Hugging Face's trainer. */
static rlhf_tokenizer *tok_train(rlhf_ctx *ctx, const char *const *texts, const size_t *lens, int n,
                                 int vocab_size) {
    if (vocab_size < 257 || vocab_size > TOK_MAX_ID)
        err_throw(ctx, RLHF_ERR_ARG, "vocab_size %d: expected %d to %d", vocab_size, 257,
                  (int)TOK_MAX_ID);
    tok_trainer r = {.ctx = ctx, .heap.ctx = ctx};
    for (uint32_t cp = 33; cp < TOK_BYTE_CPS; cp++) {
        char c[5] = {0};
        tok_put_char(c, cp);
        if (cp < 127 || (cp > 160 && cp != 173)) tok_train_id(&r, c);
    }
    /* Words are cut by the tokenizer that the result will be, so training and encoding agree on
     * them. */
    rlhf_tokenizer *bytes = tok_train_result(&r);
    err_defer(ctx, tok_free, bytes);
    tok_train_words(&r, bytes, texts, lens, n);
    err_release(ctx);
    tok_train_merges(&r, vocab_size - 1);
    rlhf_tokenizer *t = tok_train_result(&r);
    for (int i = 0; i < (int)stbds_arrlen(r.texts); i++) mem_free(r.texts[i]);
    for (int w = 0; w < r.n_words; w++) mem_free(r.words[w].ids);
    for (ptrdiff_t k = 0; k < stbds_hmlen(r.pairs); k++) stbds_arrfree(r.pairs[k].value.words);
    stbds_arrfree(r.texts);
    stbds_shfree(r.ids);
    stbds_arrfree(r.merges);
    mem_free(r.words);
    stbds_hmfree(r.pairs);
    stbds_arrfree(r.risen);
    mem_free(r.heap.e);
    return t;
}

/* ============================================================================================
 * MARK: - 15 CHAT (chat_)
 * Conversations as text, as the checkpoint's own Jinja template would write them. A template is a
 * row of data, known by words that only its Jinja text has; nothing here runs Jinja. Since the rows
 * say where an answer begins and ends, so do the spans that bear loss.
 *
 * Two things differ from a template that has them: Llama 3.2's date is always 26 Jul 2024, so that
 * equal data give equal ids on every day; and the text that some put behind a whole conversation is
 * left away, since it is never predicted.
 *
 * Entry: chat_choose, chat_end, chat_render.
 * Tests: test/test_chat.c
 * ============================================================================================ */

enum { CHAT_SYSTEM, CHAT_USER, CHAT_ASSISTANT, CHAT_ROLE_COUNT };

/* What a template does beyond writing one turn after the other. */
enum {
    CHAT_ALTERNATES = 1,   /* user and assistant take turns, the user begins; no system turn */
    CHAT_SYSTEM_FIRST = 2, /* the system text opens the user's first turn */
    CHAT_SYSTEM_LAST = 4,  /* the system text opens the user's last turn */
    CHAT_THINKS = 8,       /* thoughts precede the answer to the last question, see chat_think */
    CHAT_NO_THOUGHTS = 16  /* with THINKS: an empty thought belongs to what is generated from */
};

/* A template. Null texts are empty. A turn is
 *     head[role] | lead CONTENT close[role] | after
 * and the part between the bars bears loss in turns of the assistant. */
typedef struct chat_template {
    const char *name;
    const char *marks[8];               /* words of its Jinja text; after '!': words it has not */
    const char *begin;                  /* before everything */
    const char *head[CHAT_ROLE_COUNT];  /* what names the role */
    const char *lead;                   /* before the content, the assistant's only */
    const char *close[CHAT_ROLE_COUNT]; /* the end of a turn */
    const char *after;
    const char *system;   /* system text of a conversation that begins without; null: no turn */
    const char *preamble; /* before a system text that begins a conversation */
    int trim;             /* roles, as bits, whose content loses the space around it */
    int flags;
} chat_template;

#define CHAT_HEADS(open, close)                                                                    \
    { open "system" close, open "user" close, open "assistant" close }
#define CHAT_EACH(text)                                                                            \
    { text, text, text }
#define CHAT_ANY (1 << CHAT_SYSTEM | 1 << CHAT_USER | 1 << CHAT_ASSISTANT)
#define CHAT_IM                                                                                    \
    .head = CHAT_HEADS("<|im_start|>", "\n"), .close = CHAT_EACH("<|im_end|>"), .after = "\n"
#define CHAT_NO_THOUGHT "<think>\n\n</think>\n\n"

/* In the order of CHAT_NAMES. A Jinja text is the first row whose marks it bears. */
static const chat_template chat_templates[] = {
    {.name = "plain", .after = "\n"},
    {.name = "hh",
     .marks = {"Human:", "Assistant:", "!<|"},
     .head = {"\n\nSystem: ", "\n\nHuman: ", "\n\nAssistant:"},
     .lead = " "},
    /* A system text that the row does not know would be lost: "You are a ..." and the like. */
    {.name = "chatml",
     .marks = {"<|im_start|>", "<|im_end|>", "!think", "!bos_token", "!You are a", "!'You are",
               "!system\\nYou", "!Please reason"},
     CHAT_IM},
    {.name = "qwen2",
     .marks = {"<|im_start|>", "You are a helpful assistant", "!created by", "!think"},
     CHAT_IM,
     .system = "You are a helpful assistant."},
    {.name = "qwen2.5",
     .marks = {"<|im_start|>", "You are Qwen, created by Alibaba Cloud. You are", "!think"},
     CHAT_IM,
     .system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    /* Those that always think, or think in every turn, are others. */
    {.name = "qwen3",
     .marks = {"<|im_start|>", "if loop.index0 > ns.last_query_index", "!'<think>\\n' }}",
               "!assistant\\n<think>"},
     CHAT_IM,
     .flags = CHAT_THINKS},
    {.name = "qwen3-nothink", CHAT_IM, .flags = CHAT_THINKS | CHAT_NO_THOUGHTS},
    {.name = "smollm2",
     .marks = {"<|im_start|>", "You are a helpful AI assistant named SmolLM", "!think"},
     CHAT_IM,
     .system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
    {.name = "llama-3",
     .marks = {"<|start_header_id|>", "<|eot_id|>", "!Cutting Knowledge", "!You are", "!think"},
     .begin = "<|begin_of_text|>",
     .head = CHAT_HEADS("<|start_header_id|>", "<|end_header_id|>\n\n"),
     .close = CHAT_EACH("<|eot_id|>"),
     .trim = CHAT_ANY},
    {.name = "llama-3.2",
     .marks = {"<|start_header_id|>", "Cutting Knowledge Date: December 2023", "26 Jul 2024"},
     .begin = "<|begin_of_text|>",
     .head = CHAT_HEADS("<|start_header_id|>", "<|end_header_id|>\n\n"),
     .close = CHAT_EACH("<|eot_id|>"),
     .system = "",
     .preamble = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
     .trim = CHAT_ANY},
    {.name = "mistral-v0.1",
     .marks = {" [INST] ", " [/INST]", "!<<SYS>>", "![SYSTEM_PROMPT]"},
     .begin = "<s>",
     .head = {NULL, " [INST] ", NULL},
     .lead = " ",
     .close = {NULL, " [/INST]", "</s>"},
     .flags = CHAT_ALTERNATES | CHAT_SYSTEM_FIRST},
    {.name = "mistral-v0.3",
     .marks = {"[INST] ", "[/INST]", "! [INST]", "! [/INST]", "![SYSTEM_PROMPT]", "!<<SYS>>"},
     .begin = "<s>",
     .head = {NULL, "[INST] ", NULL},
     .lead = " ",
     .close = {NULL, "[/INST]", "</s>"},
     .trim = 1 << CHAT_ASSISTANT,
     .flags = CHAT_ALTERNATES | CHAT_SYSTEM_LAST},
    {.name = "gemma",
     .marks = {"<start_of_turn>", "System role not supported"},
     .begin = "<bos>",
     .head = {NULL, "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .close = CHAT_EACH("<end_of_turn>"),
     .after = "\n",
     .trim = CHAT_ANY,
     .flags = CHAT_ALTERNATES},
    {.name = "gemma-3",
     .marks = {"<start_of_turn>", "first_user_prefix"},
     .begin = "<bos>",
     .head = {NULL, "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .close = CHAT_EACH("<end_of_turn>"),
     .after = "\n",
     .trim = CHAT_ANY,
     .flags = CHAT_ALTERNATES | CHAT_SYSTEM_FIRST},
    {.name = "phi-3",
     .marks = {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "!bos_token", "!You are"},
     .head = CHAT_HEADS("<|", "|>\n"),
     .close = CHAT_EACH("<|end|>"),
     .after = "\n"},
    {.name = "zephyr",
     .marks = {"<|system|>", "<|user|>", "<|assistant|>", "eos_token }}\n", "!<|end|>", "!You are"},
     .head = CHAT_HEADS("<|", "|>\n"),
     .close = CHAT_EACH("</s>"),
     .after = "\n"},
};
#define CHAT_NAMES                                                                                 \
    "plain|hh|chatml|qwen2|qwen2.5|qwen3|qwen3-nothink|smollm2|llama-3|llama-3.2|mistral-v0.1|"    \
    "mistral-v0.3|gemma|gemma-3|phi-3|zephyr"
enum { CHAT_TEMPLATES = sizeof chat_templates / sizeof *chat_templates };

/* One message. */
typedef struct chat_message {
    const char *role, *content;
} chat_message;

/* Bytes [start, end) of a rendered text. */
typedef struct chat_span {
    size_t start, end;
} chat_span;

/* ---- choosing ---- */

/* The template of that name, or null. */
static const chat_template *chat_named(const char *name) {
    for (int i = 0; i < CHAT_TEMPLATES; i++)
        if (!strcmp(chat_templates[i].name, name)) return &chat_templates[i];
    return NULL;
}

/* Whether a Jinja text bears all the marks of a template that has some. */
static int chat_matches(const chat_template *c, const char *jinja) {
    for (size_t i = 0; i < sizeof c->marks / sizeof *c->marks && c->marks[i]; i++) {
        int absent = c->marks[i][0] == '!';
        if ((strstr(jinja, c->marks[i] + absent) != NULL) == absent) return 0;
    }
    return c->marks[0] != NULL;
}

/* The token that ends a turn of the assistant, or -1: the template has none, or the tokenizer. */
static int chat_end(rlhf_tokenizer *t, const chat_template *c) {
    return c->close[CHAT_ASSISTANT] ? tok_find(t, c->close[CHAT_ASSISTANT]) : -1;
}

/* The template that a Jinja text is, or null. Its end of turn has to be a token of the tokenizer:
 * else it is the text of a relative with another one. */
static const chat_template *chat_detect(rlhf_tokenizer *t, const char *jinja) {
    for (int i = 0; i < CHAT_TEMPLATES; i++) {
        const chat_template *c = &chat_templates[i];
        if (chat_matches(c, jinja))
            return !c->close[CHAT_ASSISTANT] || chat_end(t, c) >= 0 ? c : NULL;
    }
    return NULL;
}

/* The template to use: name, or for "auto" the tokenizer's own; one that has none speaks as the
 * transcripts of hh-rlhf do. */
static const chat_template *chat_choose(rlhf_tokenizer *t, const char *name) {
    int is_auto = !strcmp(name, "auto");
    const chat_template *c = !is_auto            ? chat_named(name)
                             : !t->chat_template ? chat_named("hh")
                                                 : chat_detect(t, t->chat_template);
    if (!c && is_auto)
        err_throw(t->ctx, RLHF_ERR_UNSUPPORTED,
                  "the tokenizer's chat_template is none of those known here; say which one it is "
                  "like with --chat_template (rlhf_data_config.chat_template): " CHAT_NAMES);
    if (!c)
        err_throw(t->ctx, RLHF_ERR_ARG, "chat template \"%s\": expected auto|" CHAT_NAMES, name);
    return c;
}

/* ---- rendering ---- */

/* The role of that name, or -1. */
static int chat_role(const char *name) {
    static const char *const roles[] = {"system", "user", "assistant", NULL};
    return tok_choice(name, roles);
}

/* What keeps a conversation from being rendered, or null. A system text begins it, if at all, where
 * the template has no turn for it. */
static const char *chat_check(const chat_template *c, const chat_message *m, int n) {
    for (int i = 0; i < n; i++)
        if (chat_role(m[i].role) < 0) return "a role is none of system, user and assistant";
    if (!(c->flags & CHAT_ALTERNATES)) return NULL;
    int system = n > 0 && chat_role(m[0].role) == CHAT_SYSTEM;
    if (system && !(c->flags & (CHAT_SYSTEM_FIRST | CHAT_SYSTEM_LAST)))
        return "the chat template has no system turn; put its text into the user's first one";
    for (int i = system; i < n; i++)
        if (chat_role(m[i].role) != ((i - system) % 2 ? CHAT_ASSISTANT : CHAT_USER))
            return "the chat template wants turns of user and assistant in alternation, the user's "
                   "first";
    return system && n == 1 ? "the chat template wants a user's turn after the system text" : NULL;
}

/* Appends s, which may be null. */
static void chat_put(tok_buf *b, const char *s) {
    if (s) tok_put(b, s, strlen(s));
}

/* What Jinja's trim takes away: white space, and four separators that Python counts to it. */
static int chat_is_space(uint32_t c) { return tok_is_space(c) || (c >= 0x1c && c <= 0x1f); }

/* The text without the white space around it; *n is its length. */
static const char *chat_trim(const char *s, size_t *n) {
    uint32_t cp = 0;
    for (size_t k; *n && (k = (size_t)tok_char(s, *n, &cp), chat_is_space(cp)); s += k) *n -= k;
    while (*n) {
        size_t at = *n - 1;
        while (at && ((unsigned char)s[at] & 0xc0) == 0x80) at--;
        tok_char(s + at, *n - at, &cp);
        if (!chat_is_space(cp)) break;
        *n = at;
    }
    return s;
}

/* s without newlines at its start. */
static const char *chat_skip_newlines(const char *s) { return s + strspn(s, "\n"); }

/* The assistant's content as a thinking template writes it: in answers to the user's last turn the
 * thoughts come first, empty ones in the last turn; in earlier turns they are left out. */
static void chat_think(tok_buf *b, const char *content, int is_answer, int is_last) {
    static const char open[] = "<think>", close[] = "</think>";
    const char *end = strstr(content, close), *from = content, *answer = content, *p;
    size_t n = 0;
    if (end) {
        for (p = content; (p = strstr(p, open)) && p < end; p += sizeof open - 1)
            from = p + sizeof open - 1;
        for (p = end; p; p = strstr(p, close)) answer = p += sizeof close - 1;
        answer = chat_skip_newlines(answer);
        from = chat_skip_newlines(from);
        n = from < end ? (size_t)(end - from) : 0;
        while (n && from[n - 1] == '\n') n--;
    }
    if (is_answer && (is_last || n)) {
        chat_put(b, "<think>\n");
        tok_put(b, from, n);
        chat_put(b, "\n</think>\n\n");
        answer = chat_skip_newlines(answer);
    }
    chat_put(b, answer);
}

/* One turn: `before` and `gap`, then the content. Returns what bears loss if it is the
 * assistant's. */
static chat_span chat_turn(tok_buf *b, const chat_template *c, int role, const char *before,
                           const char *gap, const char *content) {
    size_t n = strlen(content);
    if (c->trim >> role & 1) content = chat_trim(content, &n);
    chat_put(b, c->head[role]);
    chat_span span = {b->n, 0};
    if (role == CHAT_ASSISTANT) chat_put(b, c->lead);
    chat_put(b, before);
    chat_put(b, gap);
    tok_put(b, content, n);
    chat_put(b, c->close[role]);
    span.end = b->n;
    chat_put(b, c->after);
    return span;
}

/* Renders a conversation, a block. For each assistant turn, spans (room for n, or null) gets the
 * bytes that bear loss: the content and the token that ends the turn. The templates plain and hh
 * have no such token: whoever needs one appends the end-of-text id. generate: the text ends where
 * the assistant's next content begins. To be encoded with add_special 0, unless the template has no
 * tokens of its own. */
static char *chat_render(rlhf_tokenizer *t, const char *template, const chat_message *m, int n,
                         int generate, chat_span *spans, int *n_spans) {
    const chat_template *c = chat_choose(t, template);
    const char *bad = chat_check(c, m, n);
    if (bad) err_throw(t->ctx, RLHF_ERR_DATA, "%s: %s", c->name, bad);
    tok_buf b = {t->ctx, NULL, 0, 0}, thought = b;
    int count = 0, system = n > 0 && chat_role(m[0].role) == CHAT_SYSTEM, last_user = n - 1;
    while (last_user > 0 && chat_role(m[last_user].role) != CHAT_USER) last_user--;
    if (last_user < 0 || chat_role(m[last_user].role) != CHAT_USER) last_user = n - 1;
    /* The turn that the system text opens, where it has none of its own. */
    int joins = !system || !(c->flags & CHAT_ALTERNATES) ? -1
                : c->flags & CHAT_SYSTEM_FIRST           ? 1
                                                         : last_user;
    chat_put(&b, c->begin);
    if (c->system && !system) chat_turn(&b, c, CHAT_SYSTEM, c->preamble, NULL, c->system);
    for (int i = joins >= 0; i < n; i++) {
        int role = chat_role(m[i].role), thinks = role == CHAT_ASSISTANT && c->flags & CHAT_THINKS;
        const char *content = m[i].content, *before = NULL;
        if (i == joins) before = m[0].content;
        else if (i == 0 && role == CHAT_SYSTEM) before = c->preamble;
        if (thinks) {
            thought.n = 0;
            tok_put(&thought, "", 0);
            chat_think(&thought, content, i > last_user, i == n - 1);
            content = thought.p;
        }
        chat_span span = chat_turn(&b, c, role, before, i == joins ? "\n\n" : NULL, content);
        if (c->flags & CHAT_NO_THOUGHTS && thinks &&
            !strncmp(content, CHAT_NO_THOUGHT, sizeof CHAT_NO_THOUGHT - 1))
            span.start += sizeof CHAT_NO_THOUGHT - 1;
        if (role == CHAT_ASSISTANT && spans) spans[count] = span;
        count += role == CHAT_ASSISTANT;
    }
    /* The same head that a turn of the assistant would have. */
    if (generate) chat_put(&b, c->head[CHAT_ASSISTANT]);
    if (generate && c->flags & CHAT_NO_THOUGHTS) chat_put(&b, CHAT_NO_THOUGHT);
    tok_put(&b, "", 0);
    mem_free(thought.p);
    if (n_spans) *n_spans = count;
    return b.p;
}

/* ============================================================================================
 * MARK: - 16 FAMILY (model_)
 * A decoder's architecture as data: a family is a reader for its config.json and a list that maps
 * its tensors onto one table of parameters. Forward, backward and decoding (18) are written once
 * for all of them; what they do not compute is refused here.
 *
 * Entry: model_find_family, model_is; MODEL_PARAMS.
 * Tests: test/test_model.c, test/test_golden.c
 * ============================================================================================ */

/* The activation of an MLP. */
typedef enum model_act { ACT_SILU, ACT_GELU_TANH, ACT_GELU_ERF } model_act;

/* What is special about one layer. */
enum {
    MODEL_LOCAL = 1, /* attention to the last `window` positions, rotation by local_theta */
    MODEL_NOPE = 2   /* no rotation */
};

/* Matrices that may have an adapter, as files name them: QKV is one tensor in some families, three
 * in others; FC is the up matrix of an MLP without a gate. */
enum {
    LORA_QKV,
    LORA_Q,
    LORA_K,
    LORA_V,
    LORA_O,
    LORA_FC,
    LORA_GATE,
    LORA_UP,
    LORA_DOWN,
    LORA_MODULES
};

/* Adapters as PEFT's LoraConfig describes them. */
typedef struct model_lora {
    int r;       /* rank; 0: none */
    unsigned on; /* 1 << LORA_Q and such: which matrices have one */
    int rslora;  /* scale alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r */
    float alpha, dropout;
} model_lora;

/* What config.json says, in the terms of this section. Names follow the papers: ff is the width of
 * the MLP, hd that of a head; heads hd need not be d. */
typedef struct model_cfg {
    int vocab, d, layers, heads, kv_heads, hd, ff, positions;
    float eps, theta, init_range;
    float rope_factor, rope_low, rope_high, rope_original; /* Llama 3 scaling; factor 0: none */
    float local_theta;         /* of local layers; 0: theta; they are never scaled */
    int rot;                   /* dimensions of a head that are rotated */
    int window;                /* of local layers */
    uint8_t *kinds;            /* [layers], MODEL_LOCAL and such, or null: no layer has any */
    float norm_base;           /* RMSNorm multiplies by norm_base + weight */
    float embed_scale;         /* of the embedding's output; 0: none */
    float attn_scale;          /* of attention scores */
    float attn_cap, logit_cap; /* soft caps of scores and of logits; 0: none */
    model_act act;             /* the gate's where there is one */
    int layer_norm;            /* 1: LayerNorm with bias, 0: RMSNorm */
    int learned_pos;           /* 1: a table of positions, 0: rotary */
    int glu;                   /* 1: act(gate) up, 0: act(up) */
    int qk_norm;               /* each head's query and key is normed, before its rotation */
    int post_norms;            /* what attention and MLP add to x is normed, too */
    int parallel;              /* the MLP reads what attention reads: x of the layer's input */
    int qkv_bias, o_bias, mlp_bias, tied; /* tied: logits come from WTE */
    int scaled_init;                      /* residual projections start smaller by sqrt(2 layers) */
    model_lora lora;                      /* adapters */
    rlhf_head head; /* by "architectures": a ...ForSequenceClassification is a scorer */
} model_cfg;

/* Both matrices of an adapter, as rows of the list below. */
#define MODEL_LORA(X, name, rows, cols)                                                            \
    X(name##_LA, 1, c->lora.r, cols, c->lora.on >> LORA_##name & 1, 'a')                           \
    X(name##_LB, 1, rows, c->lora.r, c->lora.on >> LORA_##name & 1, 'b')

/* Every parameter: name, in every layer, rows, columns, exists, initial value ('n' normal, 'r'
 * normal of a residual projection, '1' what makes a norm's factor 1, '0', 'a' and 'b' of adapters).
 * The list makes the enum, the layout, initialisation, weight decay (to those with more than one
 * column and to the score head) and the order of model_hash. A matrix is [rows][cols] with y = x
 * W^T; QKV holds queries, keys and values below each other, UP gate and up. */
#define MODEL_PARAMS(X)                                                                            \
    X(WTE, 0, c->vocab, c->d, 1, 'n')                                                              \
    X(WPE, 0, c->positions, c->d, c->learned_pos, 'n')                                             \
    X(LN1_W, 1, c->d, 1, 1, '1')                                                                   \
    X(LN1_B, 1, c->d, 1, c->layer_norm, '0')                                                       \
    X(QKV_W, 1, (c->heads + 2 * c->kv_heads) * c->hd, c->d, 1, 'n')                                \
    X(QKV_B, 1, (c->heads + 2 * c->kv_heads) * c->hd, 1, c->qkv_bias, '0')                         \
    X(QN_W, 1, c->hd, 1, c->qk_norm, '1')                                                          \
    X(KN_W, 1, c->hd, 1, c->qk_norm, '1')                                                          \
    X(O_W, 1, c->d, c->heads * c->hd, 1, 'r')                                                      \
    X(O_B, 1, c->d, 1, c->o_bias, '0')                                                             \
    X(PN1_W, 1, c->d, 1, c->post_norms, '1')                                                       \
    X(LN2_W, 1, c->d, 1, 1, '1')                                                                   \
    X(LN2_B, 1, c->d, 1, c->layer_norm, '0')                                                       \
    X(UP_W, 1, c->ff *(1 + c->glu), c->d, 1, 'n')                                                  \
    X(UP_B, 1, c->ff *(1 + c->glu), 1, c->mlp_bias, '0')                                           \
    X(DOWN_W, 1, c->d, c->ff, 1, 'r')                                                              \
    X(DOWN_B, 1, c->d, 1, c->mlp_bias, '0')                                                        \
    X(PN2_W, 1, c->d, 1, c->post_norms, '1')                                                       \
    MODEL_LORA(X, QKV, (c->heads + 2 * c->kv_heads) * c->hd, c->d)                                 \
    MODEL_LORA(X, Q, c->heads * c->hd, c->d)                                                       \
    MODEL_LORA(X, K, c->kv_heads * c->hd, c->d)                                                    \
    MODEL_LORA(X, V, c->kv_heads * c->hd, c->d)                                                    \
    MODEL_LORA(X, O, c->d, c->heads * c->hd)                                                       \
    MODEL_LORA(X, FC, c->ff, c->d)                                                                 \
    MODEL_LORA(X, GATE, c->ff, c->d)                                                               \
    MODEL_LORA(X, UP, c->ff, c->d)                                                                 \
    MODEL_LORA(X, DOWN, c->d, c->ff)                                                               \
    X(LNF_W, 0, c->d, 1, 1, '1')                                                                   \
    X(LNF_B, 0, c->d, 1, c->layer_norm, '0')                                                       \
    X(HEAD, 0, c->vocab, c->d, c->head == RLHF_HEAD_LM && !c->tied, 'n')                           \
    X(SCORE, 0, 1, c->d, c->head == RLHF_HEAD_SCORE, '0')

/* P_WTE ... P_SCORE; P_COUNT also stands for "no bias". */
typedef enum model_param {
#define MODEL_ENUM(name, per_layer, rows, cols, exists, init) P_##name,
    MODEL_PARAMS(MODEL_ENUM)
#undef MODEL_ENUM
        P_COUNT
} model_param;

/* Which part of a parameter's rows a tensor of a file holds. PART_HEADS are all rows in another
 * order: query, key and value of the first head, of the second, and so on. */
typedef enum model_part {
    PART_ALL,
    PART_Q,
    PART_K,
    PART_V,
    PART_GATE,
    PART_UP,
    PART_HEADS
} model_part;

/* One tensor of a file and where it goes. transposed: the file has [cols][rows], as GPT-2's
 * Conv1D. */
typedef struct model_tensor {
    const char *name; /* %d stands for the layer */
    uint8_t param, part, transposed;
} model_tensor;

/* What one "model_type" is. Two families may share a list of tensors. */
typedef struct model_family {
    const char *type, *lm_class, *score_class; /* values of "model_type", "architectures" */
    const char *prefix;                        /* of every name below; files may lack it */
    int prefix_optional;
    const model_tensor *tensors;
    void (*read)(const json_src *src, const json_t *config, model_cfg *c);
} model_family;

/* ---- families ---- */

/* As transformers names them. */
static const model_tensor model_gpt2_tensors[] = {
    {"wte.weight", P_WTE, PART_ALL, 0},
    {"wpe.weight", P_WPE, PART_ALL, 0},
    {"h.%d.ln_1.weight", P_LN1_W, PART_ALL, 0},
    {"h.%d.ln_1.bias", P_LN1_B, PART_ALL, 0},
    {"h.%d.attn.c_attn.weight", P_QKV_W, PART_ALL, 1},
    {"h.%d.attn.c_attn.bias", P_QKV_B, PART_ALL, 0},
    {"h.%d.attn.c_proj.weight", P_O_W, PART_ALL, 1},
    {"h.%d.attn.c_proj.bias", P_O_B, PART_ALL, 0},
    {"h.%d.ln_2.weight", P_LN2_W, PART_ALL, 0},
    {"h.%d.ln_2.bias", P_LN2_B, PART_ALL, 0},
    {"h.%d.mlp.c_fc.weight", P_UP_W, PART_ALL, 1},
    {"h.%d.mlp.c_fc.bias", P_UP_B, PART_ALL, 0},
    {"h.%d.mlp.c_proj.weight", P_DOWN_W, PART_ALL, 1},
    {"h.%d.mlp.c_proj.bias", P_DOWN_B, PART_ALL, 0},
    {"ln_f.weight", P_LNF_W, PART_ALL, 0},
    {"ln_f.bias", P_LNF_B, PART_ALL, 0},
    {"!lm_head.weight", P_HEAD, PART_ALL, 0}, /* '!': the name has no prefix */
    {"!score.weight", P_SCORE, PART_ALL, 0},
    {NULL, 0, 0, 0}};

/* GPT-NeoX, the family of Pythia. */
static const model_tensor model_neox_tensors[] = {
    {"embed_in.weight", P_WTE, PART_ALL, 0},
    {"layers.%d.input_layernorm.weight", P_LN1_W, PART_ALL, 0},
    {"layers.%d.input_layernorm.bias", P_LN1_B, PART_ALL, 0},
    {"layers.%d.attention.query_key_value.weight", P_QKV_W, PART_HEADS, 0},
    {"layers.%d.attention.query_key_value.bias", P_QKV_B, PART_HEADS, 0},
    {"layers.%d.attention.dense.weight", P_O_W, PART_ALL, 0},
    {"layers.%d.attention.dense.bias", P_O_B, PART_ALL, 0},
    {"layers.%d.post_attention_layernorm.weight", P_LN2_W, PART_ALL, 0},
    {"layers.%d.post_attention_layernorm.bias", P_LN2_B, PART_ALL, 0},
    {"layers.%d.mlp.dense_h_to_4h.weight", P_UP_W, PART_ALL, 0},
    {"layers.%d.mlp.dense_h_to_4h.bias", P_UP_B, PART_ALL, 0},
    {"layers.%d.mlp.dense_4h_to_h.weight", P_DOWN_W, PART_ALL, 0},
    {"layers.%d.mlp.dense_4h_to_h.bias", P_DOWN_B, PART_ALL, 0},
    {"final_layer_norm.weight", P_LNF_W, PART_ALL, 0},
    {"final_layer_norm.bias", P_LNF_B, PART_ALL, 0},
    {"!embed_out.weight", P_HEAD, PART_ALL, 0},
    {"!score.weight", P_SCORE, PART_ALL, 0},
    {NULL, 0, 0, 0}};

/* What llama and gemma 2 and 3 have in common: before the norm behind attention, the MLP, the end.
 */
#define MODEL_LLAMA_ATTENTION                                                                      \
    {"embed_tokens.weight", P_WTE, PART_ALL, 0},                                                   \
        {"layers.%d.input_layernorm.weight", P_LN1_W, PART_ALL, 0},                                \
        {"layers.%d.self_attn.q_proj.weight", P_QKV_W, PART_Q, 0},                                 \
        {"layers.%d.self_attn.k_proj.weight", P_QKV_W, PART_K, 0},                                 \
        {"layers.%d.self_attn.v_proj.weight", P_QKV_W, PART_V, 0},                                 \
        {"layers.%d.self_attn.q_proj.bias", P_QKV_B, PART_Q, 0},                                   \
        {"layers.%d.self_attn.k_proj.bias", P_QKV_B, PART_K, 0},                                   \
        {"layers.%d.self_attn.v_proj.bias", P_QKV_B, PART_V, 0},                                   \
        {"layers.%d.self_attn.q_norm.weight", P_QN_W, PART_ALL, 0},                                \
        {"layers.%d.self_attn.k_norm.weight", P_KN_W, PART_ALL, 0},                                \
        {"layers.%d.self_attn.o_proj.weight", P_O_W, PART_ALL, 0}, {                               \
        "layers.%d.self_attn.o_proj.bias", P_O_B, PART_ALL, 0                                      \
    }
#define MODEL_LLAMA_MLP                                                                            \
    {"layers.%d.mlp.gate_proj.weight", P_UP_W, PART_GATE, 0},                                      \
        {"layers.%d.mlp.up_proj.weight", P_UP_W, PART_UP, 0},                                      \
        {"layers.%d.mlp.gate_proj.bias", P_UP_B, PART_GATE, 0},                                    \
        {"layers.%d.mlp.up_proj.bias", P_UP_B, PART_UP, 0},                                        \
        {"layers.%d.mlp.down_proj.weight", P_DOWN_W, PART_ALL, 0}, {                               \
        "layers.%d.mlp.down_proj.bias", P_DOWN_B, PART_ALL, 0                                      \
    }
#define MODEL_LLAMA_END                                                                            \
    {"norm.weight", P_LNF_W, PART_ALL, 0}, {"!lm_head.weight", P_HEAD, PART_ALL, 0},               \
        {"!score.weight", P_SCORE, PART_ALL, 0}, {                                                 \
        NULL, 0, 0, 0                                                                              \
    }

/* Gemma 2 and 3: four norms in a layer, of which post_attention_layernorm is another than llama's.
 */
static const model_tensor model_gemma_tensors[] = {
    MODEL_LLAMA_ATTENTION,
    {"layers.%d.post_attention_layernorm.weight", P_PN1_W, PART_ALL, 0},
    {"layers.%d.pre_feedforward_layernorm.weight", P_LN2_W, PART_ALL, 0},
    MODEL_LLAMA_MLP,
    {"layers.%d.post_feedforward_layernorm.weight", P_PN2_W, PART_ALL, 0},
    MODEL_LLAMA_END};

/* Of llama and of what differs from it by biases, norms of heads and windows alone (mistral, qwen2,
 * qwen3, smollm3, gemma). */
static const model_tensor model_llama_tensors[] = {
    MODEL_LLAMA_ATTENTION,
    {"layers.%d.post_attention_layernorm.weight", P_LN2_W, PART_ALL, 0},
    MODEL_LLAMA_MLP,
    MODEL_LLAMA_END};

enum { MODEL_MAX = 1 << 24 }; /* larger sizes in a config are taken for damage */

/* Throws unless the text under key is one of `allowed` (separated by '|'): where a family's files
 * may ask for what nothing here computes. */
static void model_need_choice(const json_src *src, const json_t *config, const char *key,
                              const char *def, const char *allowed) {
    const char *value = json_opt_str(src, config, key, def);
    if (base_is_choice(allowed, value)) return;
    err_throw(src->ctx, RLHF_ERR_UNSUPPORTED, "%s: \"%s\" is \"%s\"; this version computes %s",
              src->file, key, value, allowed);
}

/* Readers fill what is not zero in c; the file's defaults are those of transformers. */
static void model_read_gpt2(const json_src *src, const json_t *j, model_cfg *c) {
    c->d = (int)json_need_int(src, j, "n_embd", 1, MODEL_MAX);
    c->layers = (int)json_need_int(src, j, "n_layer", 1, 100000);
    c->heads = c->kv_heads = (int)json_need_int(src, j, "n_head", 1, 100000);
    c->positions = (int)json_opt_int(src, j, "n_positions", 1, MODEL_MAX, 1024);
    c->ff = (int)json_opt_int(src, j, "n_inner", 1, MODEL_MAX, 4 * (int64_t)c->d);
    c->eps = (float)json_opt_real(src, j, "layer_norm_epsilon", 1e-5);
    c->hd = c->d / c->heads;
    if (c->d % c->heads)
        err_throw(src->ctx, RLHF_ERR_FORMAT, "%s: \"n_embd\" %d is not a multiple of \"n_head\" %d",
                  src->file, c->d, c->heads);
    model_need_choice(src, j, "activation_function", "gelu_new", "gelu_new|gelu_pytorch_tanh");
    c->act = ACT_GELU_TANH;
    c->layer_norm = c->learned_pos = c->qkv_bias = c->o_bias = c->mlp_bias = c->scaled_init = 1;
    c->tied = json_opt_bool(src, j, "tie_word_embeddings", 1);
}

/* A base of rotary positions: key of j, or the default. */
static float model_read_theta(const json_src *src, const json_t *j, const char *key, double def) {
    double theta = json_opt_real(src, j, key, def);
    if (!(theta >= 1 && theta < 1e30))
        err_throw(src->ctx, RLHF_ERR_FORMAT, "%s: \"%s\" is %g, expected 1 to 1e30", src->file, key,
                  theta);
    return (float)theta;
}

/* Rotary positions, in the form of transformers 5 (rope_parameters, by kinds of layers where there
 * are several) or the one before it (rope_theta, rope_scaling). c->theta is the default, 0 for
 * 10000. */
static void model_read_rope(const json_src *src, const json_t *j, model_cfg *c) {
    const json_t *rope = json_opt_object(src, j, "rope_parameters");
    const json_t *full = json_opt_object(src, rope, "full_attention");
    if (full) rope = full;
    c->theta = model_read_theta(src, rope ? rope : j, "rope_theta",
                                c->theta != 0 ? (double)c->theta : 10000.0);
    if (!rope) rope = json_opt_object(src, j, "rope_scaling");
    if (!rope) return;
    const char *old = json_opt_str(src, rope, "type", "default");
    const char *type = json_opt_str(src, rope, "rope_type", old);
    if (!strcmp(type, "default")) return;
    if (strcmp(type, "llama3") && strcmp(type, "linear"))
        err_throw(src->ctx, RLHF_ERR_UNSUPPORTED,
                  "%s: rotary scaling \"%s\" is not computed by this version; default, linear and "
                  "llama3 are",
                  src->file, type);
    c->rope_factor = (float)json_need_real(src, rope, "factor");
    if (!(c->rope_factor >= 1))
        err_throw(src->ctx, RLHF_ERR_FORMAT, "%s: rotary scaling: expected factor >= 1", src->file);
    if (!strcmp(type, "linear")) return;
    c->rope_low = (float)json_need_real(src, rope, "low_freq_factor");
    c->rope_high = (float)json_need_real(src, rope, "high_freq_factor");
    c->rope_original = (float)json_need_real(src, rope, "original_max_position_embeddings");
    if (!(c->rope_low > 0 && c->rope_high > c->rope_low && c->rope_original >= 1))
        err_throw(src->ctx, RLHF_ERR_FORMAT,
                  "%s: rotary scaling: expected 0 < low_freq_factor < high_freq_factor, "
                  "original_max_position_embeddings >= 1",
                  src->file);
}

/* Which layers attend to a window: those that "layer_types" names, or from layer `from` on all but
 * every period-th. def is the window where the file has no such key; null in the file: none. */
static void model_read_window(const json_src *src, const json_t *j, model_cfg *c, int64_t def,
                              int64_t from, int64_t period) {
    if (json_object_get(j, "sliding_window"))
        def = json_opt_int(src, j, "sliding_window", 1, MODEL_MAX, 0);
    json_t *types = json_opt_array(src, j, "layer_types");
    c->window = (int)def;
    if (!c->kinds) c->kinds = mem_zalloc(src->ctx, (size_t)c->layers, sizeof *c->kinds);
    for (int i = 0; i < c->layers; i++) {
        int local = i >= from && (i + 1) % period != 0;
        json_t *type = json_array_get(types, (size_t)i);
        const char *name = json_string_value(type);
        if (types && (!name || !base_is_choice("full_attention|sliding_attention", name)))
            json_bad(src, "layer_types", type ? type : types,
                     "full_attention or sliding_attention for each layer");
        if (name) local = *name == 's';
        if (local && def) c->kinds[i] |= MODEL_LOCAL;
    }
}

/* The ground of all families below but the last. Defaults that differ among them are in c: hd,
 * theta, tied. */
static void model_read_decoder(const json_src *src, const json_t *j, model_cfg *c) {
    c->d = (int)json_need_int(src, j, "hidden_size", 1, MODEL_MAX);
    c->layers = (int)json_need_int(src, j, "num_hidden_layers", 1, 100000);
    c->heads = (int)json_need_int(src, j, "num_attention_heads", 1, 100000);
    c->kv_heads = (int)json_opt_int(src, j, "num_key_value_heads", 1, c->heads, c->heads);
    c->hd = (int)json_opt_int(src, j, "head_dim", 1, MODEL_MAX, c->hd ? c->hd : c->d / c->heads);
    c->ff = (int)json_need_int(src, j, "intermediate_size", 1, MODEL_MAX);
    c->positions = (int)json_opt_int(src, j, "max_position_embeddings", 1, MODEL_MAX, 2048);
    c->eps = (float)json_opt_real(src, j, "rms_norm_eps", 1e-6);
    if (c->heads % c->kv_heads || c->hd < 2 || c->hd % 2)
        err_throw(src->ctx, RLHF_ERR_FORMAT,
                  "%s: %d heads, %d key/value heads, head_dim %d: the first is a multiple of the "
                  "second and the third is even",
                  src->file, c->heads, c->kv_heads, c->hd);
    if ((int64_t)c->heads * c->hd > MODEL_MAX)
        err_throw(src->ctx, RLHF_ERR_FORMAT, "%s: %d heads of head_dim %d are more than %d numbers",
                  src->file, c->heads, c->hd, (int)MODEL_MAX);
    model_read_rope(src, j, c);
    c->qkv_bias = c->o_bias = json_opt_bool(src, j, "attention_bias", 0);
    c->tied = json_opt_bool(src, j, "tie_word_embeddings", c->tied);
    c->glu = 1;
}

static void model_read_llama(const json_src *src, const json_t *j, model_cfg *c) {
    model_read_decoder(src, j, c);
    model_need_choice(src, j, "hidden_act", "silu", "silu");
    c->mlp_bias = json_opt_bool(src, j, "mlp_bias", 0);
}

static void model_read_mistral(const json_src *src, const json_t *j, model_cfg *c) {
    model_read_llama(src, j, c);
    model_read_window(src, j, c, 4096, 0, INT_MAX);
}

static void model_read_qwen2(const json_src *src, const json_t *j, model_cfg *c) {
    model_read_llama(src, j, c);
    c->qkv_bias = 1;
    c->o_bias = 0;
    if (json_opt_bool(src, j, "use_sliding_window", 0))
        model_read_window(src, j, c, 4096,
                          json_opt_int(src, j, "max_window_layers", 0, INT_MAX, 28), INT_MAX);
}

static void model_read_qwen3(const json_src *src, const json_t *j, model_cfg *c) {
    c->hd = 128;
    model_read_qwen2(src, j, c);
    c->qkv_bias = c->o_bias = json_opt_bool(src, j, "attention_bias", 0);
    c->qk_norm = 1;
}

/* Every fourth layer has no positions, unless the file lists the layers that have them. */
static void model_read_smollm3(const json_src *src, const json_t *j, model_cfg *c) {
    c->theta = 2000000.0f;
    c->tied = 1;
    model_read_llama(src, j, c);
    int every = (int)json_opt_int(src, j, "no_rope_layer_interval", 1, INT_MAX, 4);
    json_t *rotated = json_opt_array(src, j, "no_rope_layers");
    c->kinds = mem_zalloc(src->ctx, (size_t)c->layers, sizeof *c->kinds);
    for (int i = 0; i < c->layers; i++) {
        json_t *flag = json_array_get(rotated, (size_t)i);
        if (rotated && !json_is_integer(flag))
            json_bad(src, "no_rope_layers", flag ? flag : rotated, "1 or 0 for each layer");
        if (rotated ? json_integer_value(flag) == 0 : (i + 1) % every == 0)
            c->kinds[i] |= MODEL_NOPE;
    }
    /* Where no list of layers says so, windows go with missing positions. */
    if (!json_opt_bool(src, j, "use_sliding_window", 0)) return;
    model_read_window(src, j, c, 0, 0, INT_MAX);
    for (int i = 0; i < c->layers && !json_get(j, "layer_types"); i++)
        if (!(c->kinds[i] & MODEL_NOPE)) c->kinds[i] = 0;
}

/* A soft cap: absent means def, null none. */
static float model_read_cap(const json_src *src, const json_t *j, const char *key, double def) {
    double cap = json_object_get(j, key) ? json_opt_real(src, j, key, 0) : def;
    if (!(cap >= 0 && cap < 1e30))
        err_throw(src->ctx, RLHF_ERR_FORMAT, "%s: \"%s\" is %g, expected 0 to 1e30", src->file, key,
                  cap);
    return (float)cap;
}

/* In the first files "gelu" means the tanh form. Also the ground of the two families below. */
static void model_read_gemma(const json_src *src, const json_t *j, model_cfg *c) {
    c->hd = 256;
    c->tied = 1;
    model_read_decoder(src, j, c);
    model_need_choice(src, j, "hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh");
    model_need_choice(src, j, "hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh|gelu");
    if (json_opt_bool(src, j, "use_bidirectional_attention", 0))
        err_throw(src->ctx, RLHF_ERR_UNSUPPORTED,
                  "%s: \"use_bidirectional_attention\" is true; this version computes causal "
                  "attention",
                  src->file);
    c->act = ACT_GELU_TANH;
    c->norm_base = 1;
    c->embed_scale = (float)sqrt(c->d);
}

static void model_read_gemma2(const json_src *src, const json_t *j, model_cfg *c) {
    model_read_gemma(src, j, c);
    double scalar = json_opt_real(src, j, "query_pre_attn_scalar", 256);
    if (!(scalar > 0 && scalar < 1e30))
        err_throw(src->ctx, RLHF_ERR_FORMAT,
                  "%s: \"query_pre_attn_scalar\" is %g, expected more than 0", src->file, scalar);
    c->attn_scale = (float)(1 / sqrt(scalar));
    c->attn_cap = model_read_cap(src, j, "attn_logit_softcapping", 50);
    c->logit_cap = model_read_cap(src, j, "final_logit_softcapping", 30);
    c->post_norms = 1;
    model_read_window(src, j, c, 4096, 0, 2);
}

static void model_read_gemma3(const json_src *src, const json_t *j, model_cfg *c) {
    c->theta = 1000000.0f;
    model_read_gemma2(src, j, c);
    c->attn_cap = model_read_cap(src, j, "attn_logit_softcapping", 0);
    c->logit_cap = model_read_cap(src, j, "final_logit_softcapping", 0);
    c->qk_norm = 1;
    memset(c->kinds, 0, (size_t)c->layers * sizeof *c->kinds);
    int64_t old = json_opt_int(src, j, "_sliding_window_pattern", 1, INT_MAX, 6);
    model_read_window(src, j, c, 4096, 0,
                      json_opt_int(src, j, "sliding_window_pattern", 1, INT_MAX, old));
    /* Local layers rotate by a base of their own. */
    const json_t *rope = json_opt_object(src, j, "rope_parameters");
    const json_t *local = json_opt_object(src, rope, "sliding_attention");
    if (local) model_need_choice(src, local, "rope_type", "default", "default");
    c->local_theta = model_read_theta(src, local ? local : j,
                                      local ? "rope_theta" : "rope_local_base_freq", 10000.0);
}

static void model_read_neox(const json_src *src, const json_t *j, model_cfg *c) {
    c->d = (int)json_need_int(src, j, "hidden_size", 1, MODEL_MAX);
    c->layers = (int)json_need_int(src, j, "num_hidden_layers", 1, 100000);
    c->heads = c->kv_heads = (int)json_need_int(src, j, "num_attention_heads", 1, 100000);
    c->ff = (int)json_need_int(src, j, "intermediate_size", 1, MODEL_MAX);
    c->positions = (int)json_opt_int(src, j, "max_position_embeddings", 1, MODEL_MAX, 2048);
    c->eps = (float)json_opt_real(src, j, "layer_norm_eps", 1e-5);
    c->hd = c->d / c->heads;
    /* Transformers 5 has all of the rotation in one place. */
    const json_t *rope = json_opt_object(src, j, "rope_parameters");
    if (!rope) c->theta = model_read_theta(src, j, "rotary_emb_base", 10000.0);
    model_read_rope(src, j, c);
    double part = rope ? json_opt_real(src, rope, "partial_rotary_factor", 0.25)
                       : json_opt_real(src, j, "rotary_pct", 0.25);
    c->rot = part > 0 && part <= 1 ? (int)(c->hd * part) : 0;
    if (c->d % c->heads || c->rot < 2 || c->rot % 2)
        err_throw(
            src->ctx, RLHF_ERR_FORMAT,
            "%s: \"hidden_size\" %d, %d heads of which %g is rotated: the first is a multiple "
            "of the second, and an even number of a head's dimensions is rotated",
            src->file, c->d, c->heads, part);
    model_need_choice(src, j, "hidden_act", "gelu", "gelu|gelu_new|gelu_pytorch_tanh");
    c->act =
        strcmp(json_opt_str(src, j, "hidden_act", "gelu"), "gelu") ? ACT_GELU_TANH : ACT_GELU_ERF;
    c->qkv_bias = c->o_bias = json_opt_bool(src, j, "attention_bias", 1);
    c->parallel = json_opt_bool(src, j, "use_parallel_residual", 1);
    c->tied = json_opt_bool(src, j, "tie_word_embeddings", 0);
    c->layer_norm = c->mlp_bias = 1;
}

/* A further family is a row here, a reader, and a list of tensors if its names are new. What the
 * forward pass does not compute is refused by the reader, never ignored. */
static const model_family model_families[] = {
    {"gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "transformer.", 1,
     model_gpt2_tensors, model_read_gpt2},
    {"llama", "LlamaForCausalLM", "LlamaForSequenceClassification", "model.", 0,
     model_llama_tensors, model_read_llama},
    {"mistral", "MistralForCausalLM", "MistralForSequenceClassification", "model.", 0,
     model_llama_tensors, model_read_mistral},
    {"qwen2", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "model.", 0,
     model_llama_tensors, model_read_qwen2},
    {"qwen3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "model.", 0,
     model_llama_tensors, model_read_qwen3},
    {"smollm3", "SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification", "model.", 0,
     model_llama_tensors, model_read_smollm3},
    {"gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification", "gpt_neox.", 0,
     model_neox_tensors, model_read_neox},
    {"gemma", "GemmaForCausalLM", "GemmaForSequenceClassification", "model.", 0,
     model_llama_tensors, model_read_gemma},
    {"gemma2", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification", "model.", 0,
     model_gemma_tensors, model_read_gemma2},
    {"gemma3_text", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification", "model.", 0,
     model_gemma_tensors, model_read_gemma3}};
enum { MODEL_FAMILIES = sizeof model_families / sizeof *model_families };

/* The family that config.json names, or an error that lists the known ones. */
static const model_family *model_find_family(const json_src *src, const json_t *config) {
    const char *type = json_need_str(src, config, "model_type");
    char known[256] = "";
    for (int i = 0; i < MODEL_FAMILIES; i++) {
        if (!strcmp(type, model_families[i].type)) return model_families + i;
        size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", i ? ", " : "", model_families[i].type);
    }
    err_throw(src->ctx, RLHF_ERR_UNSUPPORTED, "%s: \"model_type\" \"%s\" is unknown; known: %s",
              src->file, type, known);
}

/* Whether a layer is of a kind: MODEL_LOCAL or MODEL_NOPE. */
static int model_is(const model_cfg *c, int layer, int kind) {
    return c->kinds && (c->kinds[layer] & kind) != 0;
}

/* ============================================================================================
 * MARK: - 17 MODEL (model_)
 * A model's weights. What is trained lies in one array, gradients and moments in arrays of the same
 * layout. A model that was opened trains nothing yet: its weights are a base that stays in the
 * files, as they are stored there, and that all models of the same files share. It becomes its own
 * array of floats (model_thaw), or gets adapters, which are then the array (model_adapt). So
 * policy, reference, value and reward model are one base with an adapter and a head each.
 *
 * Entry: model_new, model_free, model_thaw, model_adapt; model_w, model_at, model_own_layers.
 * Invariant: version changes whenever weights do; packed matrices of another version are stale.
 * Tests: test/test_model.c, test/test_golden.c
 * ============================================================================================ */

/* Where a parameter is: in the model's own array, in its base as floats, in the base's files. */
typedef enum model_where { MODEL_OWN, MODEL_FLOATS, MODEL_FILE } model_where;

/* Place of one parameter: n numbers, of an own one from at on in the flat array, in the first layer
 * that has it. n 0: this model has none. */
typedef struct model_slot {
    size_t at, n;
    int rows, cols;
    model_where where;
} model_slot;

/* Weights that nobody trains, shared by the models of one directory. Matrices are read where the
 * files are mapped; vectors and the table of positions are copied as floats. Arrays [layers *
 * P_COUNT] by layer and parameter. */
typedef struct model_base {
    rlhf_ctx *ctx;
    struct model_base *next; /* of the context's */
    int refs;
    char *dir;                     /* as it was opened */
    uint64_t files;                /* which they are (19) */
    op_piece (*piece)[OP_PIECES];  /* in the order of model_part */
    uint8_t *pieces;
    float **floats; /* null: none */
    void **blocks;  /* what floats and pieces that could not be mapped point to: [n_blocks] */
    model_slot slot[P_COUNT]; /* the shape of the model that it was opened for */
    const model_tensor *tensors;
    int layers, hd, other_score; /* other_score: it left a score head in the files */
    io_view **maps; /* [n_maps] */
    int n_blocks, n_maps;
    char *stored;   /* as rlhf_model.stored */
    float **packed; /* panels of matrices in files, made when first used */
    arena keep;     /* they lie here */
    int keep_packed;
} model_base;

/* A model: configuration, weights, and what is derived from them. */
struct rlhf_model {
    rlhf_ctx *ctx;
    const model_family *family;
    model_cfg c;    /* fixed once the model is made */
    json_t *config; /* as read; written back with what this library adds */
    size_t n;       /* floats in w: what can be trained */
    float *w;       /* [n], laid out by slot */
    model_base *base; /* null: all weights are in w */
    const op_drop *drop; /* of the training pass that runs; null: adapters see everything */
    float *g;       /* gradients, lent by the trainer that is open; null otherwise */
    op_sparse *g_embed; /* where WTE is the head too: the embedding's part of its gradient */
    model_slot slot[P_COUNT];
    size_t layer_size; /* floats from one layer to the next */
    int half;          /* products are of bfloat16 */
    int recompute;     /* training passes keep less and compute layers again, set by trainers */
    uint64_t version;  /* changes with the weights */
    float **packed; /* [layers * P_COUNT]: forward panels of the matrices, made when first used */
    uint64_t *packed_version;
    float *cosine[2], *sine[2]; /* [rope_len][rot/2]: by theta, by local_theta */
    int rope_len;
    arena ws;     /* of one call */
    arena keep;   /* tables: as long as the model */
    arena panels; /* packed lies here, or in the room that was lent for it */
    float *room;
    size_t room_size, room_used; /* floats */
    char *stored; /* [tensors of the family][layers]: dtypes in the file, as ckpt_value; 0: none */
    int32_t eos[16];
    int n_eos, bos;
    int score_trained; /* 0: the head holds what a clone starts with; scoring is refused */
    float score_mean, score_std; /* reward = (score - mean) / std */
};

/* Adds an end-of-text id unless it is there; more than the array holds are left out. */
static void model_add_eos(rlhf_model *m, int64_t id) {
    for (int i = 0; i < m->n_eos; i++)
        if (m->eos[i] == id) return;
    if (m->n_eos < (int)(sizeof m->eos / sizeof *m->eos)) m->eos[m->n_eos++] = (int32_t)id;
}

/* eos_token_id (a number or a list) and bos_token_id of config.json or generation_config.json. Both
 * files' ids end a text, since either may be the complete one. */
static void model_read_special(rlhf_model *m, const json_src *src, const json_t *j) {
    json_t *e = json_get(j, "eos_token_id"), *x;
    size_t i;
    if (json_is_array(e)) {
        json_array_foreach(e, i, x) {
            if (!json_is_integer(x) || json_integer_value(x) < 0 ||
                json_integer_value(x) > INT32_MAX)
                json_bad(src, "eos_token_id", x, "token ids");
            model_add_eos(m, json_integer_value(x));
        }
    } else if (e) {
        model_add_eos(m, json_need_int(src, j, "eos_token_id", 0, INT32_MAX));
    }
    m->bos = (int)json_opt_int(src, j, "bos_token_id", 0, INT32_MAX, m->bos);
}

/* ---- layout ---- */

/* What the layout does not keep of the table. */
static const struct {
    uint8_t per_layer, init;
} model_param_info[P_COUNT] = {
#define MODEL_INFO(name, per_layer, rows, cols, exists, init) {per_layer, init},
    MODEL_PARAMS(MODEL_INFO)
#undef MODEL_INFO
};

/* Where parameter p of a model with a base is: adapters and the score head are its own. */
static model_where model_where_of(int p, int cols) {
    int init = model_param_info[p].init;
    if (init == 'a' || init == 'b' || p == P_SCORE) return MODEL_OWN;
    return cols == 1 || p == P_WPE ? MODEL_FLOATS : MODEL_FILE;
}

/* Fills slot, layer_size and n: first what exists once, then the layers one after the other. Every
 * own parameter begins at a multiple of RLHF_LANES floats; the gaps are zeros and stay so. A model
 * without layers is a score head alone (ckpt_head_for). */
static void model_layout(rlhf_model *m) {
    const model_cfg *c = &m->c;
#define MODEL_HAS(name, exists) ((exists) && (c->layers || P_##name == P_SCORE))
#define MODEL_SIZE(name, per_layer, r, k, exists, init)                                            \
    m->slot[P_##name] = (model_slot){                                                              \
        0, MODEL_HAS(name, exists) ? base_mul(m->ctx, (size_t)(r), (size_t)(k)) : 0, (r), (k),     \
        MODEL_OWN};
    MODEL_PARAMS(MODEL_SIZE)
#undef MODEL_SIZE
#undef MODEL_HAS
    size_t at = 0, once = 0;
    /* Pass 0 places what is there once, pass 1 the first layer; the others repeat it. */
    for (int pass = 0; pass < 2; pass++) {
        for (int p = 0; p < P_COUNT; p++) {
            model_slot *s = m->slot + p;
            if (m->base) s->where = model_where_of(p, s->cols);
            if (model_param_info[p].per_layer != pass || s->where != MODEL_OWN) continue;
            s->at = at;
            at += base_round_up(s->n, RLHF_LANES);
        }
        if (!pass) once = at;
    }
    m->layer_size = at - once;
    m->n = once + base_mul(m->ctx, m->layer_size, (size_t)c->layers);
}

/* Layers that have the parameter: 0, 1 or all. Loops over (p, layer) visit every weight once. */
static int model_param_layers(const rlhf_model *m, int p) {
    return m->slot[p].n ? (model_param_info[p].per_layer ? m->c.layers : 1) : 0;
}

/* The same of what is in w: 0 for what the base has. */
static int model_own_layers(const rlhf_model *m, int p) {
    return m->slot[p].where == MODEL_OWN ? model_param_layers(m, p) : 0;
}

/* Place of an own parameter of one layer in w, and of its gradient and moments in theirs. */
static size_t model_at(const rlhf_model *m, int p, int layer) {
    return m->slot[p].at + (model_param_info[p].per_layer ? (size_t)layer * m->layer_size : 0);
}

/* Index into arrays by layer and parameter. */
static size_t model_index(int p, int layer) { return (size_t)layer * P_COUNT + (size_t)p; }

/* Weights of one parameter; null if this model has none, or in a file. */
static float *model_w(const rlhf_model *m, int p, int layer) {
    if (!m->slot[p].n || m->slot[p].where == MODEL_FILE) return NULL;
    if (m->slot[p].where == MODEL_FLOATS) return m->base->floats[model_index(p, layer)];
    return m->w + model_at(m, p, layer);
}

/* Its gradient, null also while no optimizer is attached and for what is not trained. */
static float *model_g(const rlhf_model *m, int p, int layer) {
    return m->g && model_own_layers(m, p) ? m->g + model_at(m, p, layer) : NULL;
}

/* Columns [from, from + n) of a row, wherever the parameter is. */
static void model_read(const rlhf_model *m, int p, int layer, size_t row, int from, int n,
                       float *out) {
    const float *w = model_w(m, p, layer);
    if (w) {
        memcpy(out, w + row * (size_t)m->slot[p].cols + from, (size_t)n * sizeof *out);
        return;
    }
    const op_piece *piece = m->base->piece[model_index(p, layer)];
    while (row >= (size_t)piece->rows) row -= (size_t)piece++->rows;
    op_piece_read(m->ctx->k, piece, row, from, n, out);
}

/* Weights, without gaps: all, or those in w. */
static int64_t model_count(const rlhf_model *m, int own) {
    int64_t n = 0;
    for (int p = 0; p < P_COUNT; p++)
        n += (int64_t)m->slot[p].n * (own ? model_own_layers(m, p) : model_param_layers(m, p));
    return n;
}

/* Which rows of a parameter a tensor of a file holds: QKV is queries, keys, values below each
 * other, UP gate and up. Returns their number. */
static int model_part_rows(const model_cfg *c, int part, int rows, int *from) {
    int q = c->heads * c->hd, kv = c->kv_heads * c->hd;
    *from = part == PART_K ? q : part == PART_V ? q + kv : part == PART_UP ? c->ff : 0;
    if (part == PART_Q) return q;
    if (part == PART_K || part == PART_V) return kv;
    return part == PART_GATE || part == PART_UP ? c->ff : rows;
}

/* Which of a parameter's pieces that is. */
static int model_part_piece(int part) {
    return part == PART_V ? 2 : part == PART_K || part == PART_UP ? 1 : 0;
}

/* Whether weight decay applies: to matrices, which B of an adapter of rank 1 is too. */
static int model_decays(const rlhf_model *m, int p) {
    return m->slot[p].cols > 1 || model_param_info[p].init == 'b';
}

/* ---- adapters ---- */

/* Each module: the parameter whose rows it is, and the adapter's two; part as in a file, PART_ALL
 * also for PART_HEADS. */
static const struct {
    uint8_t param, part, a, b;
} model_modules[LORA_MODULES] = {[LORA_QKV] = {P_QKV_W, PART_ALL, P_QKV_LA, P_QKV_LB},
                                 [LORA_Q] = {P_QKV_W, PART_Q, P_Q_LA, P_Q_LB},
                                 [LORA_K] = {P_QKV_W, PART_K, P_K_LA, P_K_LB},
                                 [LORA_V] = {P_QKV_W, PART_V, P_V_LA, P_V_LB},
                                 [LORA_O] = {P_O_W, PART_ALL, P_O_LA, P_O_LB},
                                 [LORA_FC] = {P_UP_W, PART_ALL, P_FC_LA, P_FC_LB},
                                 [LORA_GATE] = {P_UP_W, PART_GATE, P_GATE_LA, P_GATE_LB},
                                 [LORA_UP] = {P_UP_W, PART_UP, P_UP_LA, P_UP_LB},
                                 [LORA_DOWN] = {P_DOWN_W, PART_ALL, P_DOWN_LA, P_DOWN_LB}};

/* The module that a tensor of the family is, -1: none. */
static int model_module_of(const model_tensor *t) {
    int part = t->part == PART_HEADS ? PART_ALL : t->part;
    for (int i = 0; i < LORA_MODULES; i++)
        if (model_modules[i].param == t->param && model_modules[i].part == part) return i;
    return -1;
}

/* What the product B A is multiplied by. */
static float model_lora_scale(const model_lora *l) {
    return l->alpha / (l->rslora ? sqrtf((float)l->r) : (float)l->r);
}

/* The adapters to parameter p of a layer, into list; returns their number. */
static int model_loras(const rlhf_model *m, int p, int layer, op_lora *list) {
    int n = 0;
    for (int i = 0; i < LORA_MODULES && m->c.lora.r; i++) {
        if (model_modules[i].param != p || !(m->c.lora.on >> i & 1)) continue;
        op_lora *l = list + n++;
        *l = (op_lora){.r = m->c.lora.r, .scale = model_lora_scale(&m->c.lora)};
        l->n = model_part_rows(&m->c, model_modules[i].part, m->slot[p].rows, &l->from);
        l->a = model_w(m, model_modules[i].a, layer), l->b = model_w(m, model_modules[i].b, layer);
        l->ga = model_g(m, model_modules[i].a, layer);
        l->gb = model_g(m, model_modules[i].b, layer);
    }
    return n;
}

/* ---- bases ---- */

/* A base with room for the family's tensors of so many layers. */
static model_base *model_base_new(rlhf_ctx *ctx, const char *dir, int layers, size_t tensors) {
    model_base *b = mem_zalloc(ctx, 1, sizeof *b);
    size_t n = base_mul(ctx, (size_t)layers, P_COUNT);
    b->ctx = b->keep.ctx = ctx;
    b->dir = mem_strdup(ctx, dir);
    b->piece = mem_zalloc(ctx, n, sizeof *b->piece);
    b->pieces = mem_zalloc(ctx, n, sizeof *b->pieces);
    b->floats = mem_zalloc(ctx, n, sizeof *b->floats);
    b->blocks = mem_zalloc(ctx, n, OP_PIECES * sizeof *b->blocks);
    b->packed = mem_zalloc(ctx, n, sizeof *b->packed);
    b->stored = mem_zalloc(ctx, tensors, (size_t)layers);
    return b;
}

/* Gives a base back when the last of its models goes. */
static void model_base_drop(model_base *b) {
    if (!b || --b->refs > 0) return;
    for (model_base **p = &b->ctx->bases; *p; p = &(*p)->next)
        if (*p == b) {
            *p = b->next;
            break;
        }
    for (int i = 0; i < b->n_maps; i++) io_unmap(b->maps[i]);
    for (int i = 0; i < b->n_blocks; i++) mem_free(b->blocks[i]);
    arena_free(&b->keep);
    void *parts[] = {b->dir,    b->piece,  b->pieces, b->floats, b->blocks,
                     b->packed, b->stored, b->maps,   b};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) mem_free(parts[i]);
}

/* Gives back the pages of a matrix that files hold. */
static void model_base_forget(const model_base *b, size_t index) {
    for (int i = 0; i < b->pieces[index]; i++) {
        const op_piece *p = b->piece[index] + i;
        size_t size = (size_t)p->rows * (size_t)p->cols * (p->kind == '4' ? 4 : 2);
        for (int v = 0; v < b->n_maps; v++) io_forget(b->maps[v], p->data, size);
    }
}

/* ---- making and giving back ---- */

/* Tensors of the family in a layer: the length of its list. */
static size_t model_tensors(const rlhf_model *m) {
    size_t n = 0;
    while (m->family->tensors[n].name) n++;
    return n;
}

/* All of a model from a parsed config.json but its weights, which model_place makes. Setting
 * m->config, and keeping its reference, is the caller's part. */
static rlhf_model *model_new(rlhf_ctx *ctx, const json_src *src, json_t *config) {
    rlhf_model *m = mem_zalloc(ctx, 1, sizeof *m);
    m->ctx = ctx;
    m->half = ctx->half;
    m->ws.ctx = m->keep.ctx = m->panels.ctx = ctx;
    m->family = model_find_family(src, config);
    m->bos = -1;
    m->score_std = 1;
    /* Configuration, special ids, layout, then memory for weights and for the list of panels. */
    model_cfg *c = &m->c;
    c->init_range = (float)json_opt_real(src, config, "initializer_range", 0.02);
    c->vocab = (int)json_need_int(src, config, "vocab_size", 1, MODEL_MAX);
    m->family->read(src, config, c);
    if (!c->rot) c->rot = c->hd;
    if (c->attn_scale == 0) c->attn_scale = 1.0f / sqrtf((float)c->hd);
    if (!(c->eps >= 0 && c->eps < 1 && c->init_range >= 0 && c->init_range < 1e3f))
        err_throw(
            ctx, RLHF_ERR_FORMAT,
            "%s: the norm's epsilon is %g and initializer_range %g: expected 0 to 1, 0 to 1000",
            src->file, (double)c->eps, (double)c->init_range);
    json_t *classes = json_opt_array(src, config, "architectures");
    const char *cls = json_string_value(json_array_get(classes, 0));
    c->head = cls && strstr(cls, "ForSequenceClassification") ? RLHF_HEAD_SCORE : RLHF_HEAD_LM;
    model_read_special(m, src, config);
    m->stored = mem_zalloc(ctx, model_tensors(m), (size_t)c->layers);
    m->packed = mem_zalloc(ctx, (size_t)c->layers * P_COUNT, sizeof *m->packed);
    m->packed_version = mem_zalloc(ctx, (size_t)c->layers * P_COUNT, sizeof *m->packed_version);
    m->version = 1;
    return m;
}

/* Lays the model out, on a base or (null) by itself, and makes its array, of zeros. */
static void model_place(rlhf_model *m, model_base *base) {
    m->base = base;
    model_layout(m);
    m->w = mem_zalloc(m->ctx, m->n, sizeof *m->w);
}

/* Gives everything back, at any time after model_new; null is not allowed. */
static void model_free(rlhf_model *m) {
    arena_free(&m->ws);
    arena_free(&m->keep);
    arena_free(&m->panels);
    json_decref(m->config);
    mem_free(m->packed);
    mem_free(m->packed_version);
    mem_free(m->c.kinds);
    mem_free(m->stored);
    mem_free(m->w);
    model_base_drop(m->base);
    mem_free(m);
}

/* Gives a model another array, of the layout that `to` has and the values that are set: nothing
 * can fail here. */
static void model_replace(rlhf_model *m, const rlhf_model *to) {
    mem_free(m->w);
    m->w = mem_settle(to->w);
    memcpy(m->slot, to->slot, sizeof m->slot);
    m->layer_size = to->layer_size;
    m->n = to->n;
    m->c.lora = to->c.lora;
    if (!to->base) model_base_drop(m->base);
    m->base = to->base;
    m->version++;
}

/* Rows of a parameter that become floats, with what its adapters add. */
typedef struct model_merge {
    const rlhf_model *m;
    int p, layer, loras;
    op_lora lora[OP_PIECES];
    float *out;
} model_merge;

/* Rows [lo, hi) of W + scale B A. */
static void model_merge_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    const model_merge *g = arg;
    int cols = g->m->slot[g->p].cols;
    (void)thread;
    for (int64_t row = lo; row < hi; row++) {
        float *out = g->out + (size_t)row * (size_t)cols;
        model_read(g->m, g->p, g->layer, (size_t)row, 0, cols, out);
        for (const op_lora *l = g->lora; l < g->lora + g->loras; l++) {
            if (row < l->from || row >= l->from + l->n) continue;
            const float *b = l->b + (size_t)(row - l->from) * (size_t)l->r;
            for (int j = 0; j < cols; j++) {
                float sum = 0;
                for (int k = 0; k < l->r; k++)
                    sum = fmaf(b[k], l->a[(size_t)k * (size_t)cols + (size_t)j], sum);
                out[j] += l->scale * sum;
            }
        }
    }
}

/* Makes all weights the model's own, as floats that can be trained; adapters become part of
 * them. */
static void model_thaw(rlhf_model *m) {
    if (!m->base) return;
    rlhf_model to = *m;
    to.c.lora = (model_lora){0};
    model_place(&to, NULL);
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_param_layers(&to, p); l++) {
            model_merge g = {.m = m, .p = p, .layer = l, .out = model_w(&to, p, l)};
            g.loras = model_loras(m, p, l, g.lora);
            int64_t grain = par_grain((int64_t)to.slot[p].cols * (1 + 8 * g.loras));
            par_for(m->ctx, to.slot[p].rows, grain, model_merge_rows, &g);
        }
    model_replace(m, &to);
}

/* Gives a model on a base adapters that change nothing yet: A is uniform within 1 / sqrt(columns),
 * B zero (PEFT's default, from He et al. 2015). What it had of its own stays. */
static void model_adapt(rlhf_model *m, const model_lora *lora, uint64_t seed) {
    rlhf_model to = *m;
    to.c.lora = *lora;
    model_place(&to, m->base);
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_own_layers(&to, p); l++) {
            float *w = model_w(&to, p, l), bound = 1.0f / sqrtf((float)to.slot[p].cols);
            if (p == P_SCORE) memcpy(w, model_w(m, p, l), to.slot[p].n * sizeof *w);
            for (size_t i = 0; model_param_info[p].init == 'a' && i < to.slot[p].n; i++) {
                double u = rng_uniform(seed, RNG_LORA, (uint64_t)(w - to.w) + i);
                w[i] = (float)(2 * u - 1) * bound;
            }
        }
    model_replace(m, &to);
}

/* A standard normal number (Box and Muller 1958): sqrt(-2 ln u) cos(2 pi v) with u in (0, 1]. The
 * functions of 06 make it the same bits everywhere. */
static float model_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    float u = (float)(1.0 - rng_uniform(seed, stream, 2 * index)), s, c;
    v_sincos1((float)(6.283185307179586 * rng_uniform(seed, stream, 2 * index + 1)), &s, &c);
    return sqrtf(-2.0f * v_log1(u < FLT_MIN ? FLT_MIN : u)) * c;
}

/* Initial weights by the table: N(0, init_range), residual projections 'r' by sqrt(2 layers)
 * smaller where the family does so (Radford et al. 2019). A weight's number is its place in w, so
 * the result is a function of config and seed. */
static void model_randomize(rlhf_model *m, uint64_t seed) {
    for (int p = 0; p < P_COUNT; p++)
        for (int layer = 0; layer < model_own_layers(m, p); layer++) {
            float *w = model_w(m, p, layer), std = m->c.init_range;
            int init = model_param_info[p].init;
            if (init == 'r' && m->c.scaled_init) std /= sqrtf(2.0f * (float)m->c.layers);
            for (size_t i = 0; i < m->slot[p].n; i++) {
                uint64_t at = (uint64_t)(w - m->w) + i;
                w[i] = init == '1'   ? 1.0f - m->c.norm_base
                       : init == '0' ? 0.0f
                                     : std * model_normal(seed, RNG_INIT, at);
            }
        }
    m->version++;
}

/* The score head: N(0, 1 / (d + 1)), as in Stiennon et al. (2020), so that scores of normed states
 * begin near deviation 1. */
static void model_init_score(rlhf_model *m, uint64_t seed) {
    float *w = model_w(m, P_SCORE, 0), std = 1.0f / sqrtf((float)m->c.d + 1.0f);
    for (int i = 0; i < m->c.d; i++) w[i] = std * model_normal(seed, RNG_HEAD, (uint64_t)i);
    m->version++;
}

/* ============================================================================================
 * MARK: - 18 PASS (model_)
 * What a model computes, for all families in one way: layers (x is the residual stream [rows][d])
 * and a head:
 *     x += attention(norm(x))        x += mlp(norm(x))        logits or score = norm(x) W^T
 * where a family may norm queries and keys, norm what is added to x, or have the MLP read what
 * attention reads. The head sees chosen rows only. A model owns its weights, tables and packed
 * matrices; gradients are lent by an optimizer. What a pass computes lies in the caller's arena.
 *
 * Entry: model_batch, model_forward, model_top_fwd, model_backward; model_score_list.
 * Invariant: sampling with a cache and training run through model_forward alike.
 * Tests: test/test_model.c, test/test_golden.c
 * ============================================================================================ */

/* ---- pieces of a pass ---- */

/* From so many rows on, a product without panels packs what it reads of W itself: that costs a few
 * percent of its time. Below, panels of W are made and kept, since packing would cost as much as
 * the product. */
enum { MODEL_MANY_ROWS = 96 };

/* Panels of a matrix, or null: there are none yet and many rows, or keeping a copy would cost too
 * much memory. Own matrices are packed again when they have changed; pages of a file that have been
 * packed are given back, since it is panels that are read from then on. */
static const float *model_panels(rlhf_model *m, const op_weight *w, int p, int layer, int rows) {
    size_t i = model_index(p, layer);
    int own = m->slot[p].where == MODEL_OWN;
    float **packed = own ? m->packed + i : m->base->packed + i, *to = *packed;
    if (to && (!own || m->packed_version[i] == m->version)) return to;
    if (rows >= MODEL_MANY_ROWS || (!own && !m->base->keep_packed)) return NULL;
    size_t size = gemm_packed_size(m->ctx->k, m->half, w->k, w->n);
    if (!to && own && m->room_size - m->room_used >= size) {
        to = m->room + m->room_used;
        m->room_used += size;
    } else if (!to) to = arena_take(own ? &m->panels : &m->base->keep, size * sizeof *to, 0);
    op_env e = {m->ctx, &m->ws};
    op_pack(&e, w, to);
    /* Noted only now that they are whole: packing may fail. */
    if (own) m->packed_version[i] = m->version;
    else model_base_forget(m->base, i);
    *packed = to;
    return to;
}

/* Drops the panels of a model's own matrices. Those to come lie in room [size], whose contents are
 * lost, as long as it lasts; null: in memory of their own. */
static void model_place_panels(rlhf_model *m, float *room, size_t size) {
    size_t layers = (size_t)base_max(1, m->c.layers); /* a score head alone has none */
    memset(m->packed, 0, layers * P_COUNT * sizeof *m->packed);
    arena_free(&m->panels);
    m->room = room;
    m->room_size = size;
    m->room_used = 0;
}

/* A matrix ready for op_linear on `rows` rows, with its adapters. bias P_COUNT: none. */
static op_weight model_weight(rlhf_model *m, int p, int bias, int layer, int rows) {
    const model_slot *s = m->slot + p;
    op_weight o = {.n = s->rows, .k = s->cols, .half = m->half};
    o.w = model_w(m, p, layer);
    o.gw = model_g(m, p, layer);
    if (s->where == MODEL_FILE) {
        size_t i = model_index(p, layer);
        memcpy(o.piece, m->base->piece[i], sizeof o.piece);
        o.pieces = m->base->pieces[i];
    }
    o.packed = model_panels(m, &o, p, layer, rows);
    if (bias != P_COUNT) {
        o.b = model_w(m, bias, layer);
        o.gb = o.b ? model_g(m, bias, layer) : NULL;
    }
    o.loras = model_loras(m, p, layer, o.lora);
    /* Each matrix of each layer drops elements of its own. */
    if (o.loras && m->drop) {
        o.drop = *m->drop;
        o.drop.seed += model_index(p, layer);
    }
    return o;
}

/* The matrix from normed states to logits [vocab][d] (op_logits), or to the score [1][d], of which
 * no panels are kept: they would be sixteen times as large. */
static op_weight model_head_weight(rlhf_model *m, int rows) {
    if (m->c.head == RLHF_HEAD_SCORE) return model_weight(m, P_SCORE, P_COUNT, 0, INT_MAX);
    op_weight o = model_weight(m, m->c.tied ? P_WTE : P_HEAD, P_COUNT, 0, rows);
    o.cap = m->c.logit_cap;
    return o;
}

/* The norm whose weight is p, for rows; the caller sets x, y and the like. */
static op_norm model_norm(rlhf_model *m, int p, int layer, int rows) {
    op_norm o = {.k = m->ctx->k, .n = m->c.d, .eps = m->c.eps, .base = m->c.norm_base};
    o.rows = rows;
    o.w = model_w(m, p, layer);
    o.gw = model_g(m, p, layer);
    if (!m->c.layer_norm) return o;
    o.b = model_w(m, p + 1, layer);
    o.gb = model_g(m, p + 1, layer);
    return o;
}

/* The norms that only RMSNorm's families have (QN, KN, PN1, PN2) are without. */
_Static_assert(P_LN1_B == P_LN1_W + 1 && P_LN2_B == P_LN2_W + 1 && P_LNF_B == P_LNF_W + 1,
               "a norm's bias follows its weight");

/* Radians by which dimension j turns from one position to the next: theta^(-2j / rot) (Su et al.
 * 2021). Linear scaling slows all waves down by a factor; Llama 3 slows the long ones, leaves the
 * short ones, and blends in between. libm's pow is rounded from double to float, where libraries
 * agree. */
static float model_rope_frequency(const model_cfg *c, int j) {
    float inv = (float)(1.0 / pow((double)c->theta, (double)j / (c->rot / 2)));
    if (c->rope_factor == 0) return inv;
    if (c->rope_original == 0) return inv / c->rope_factor;
    float wave = 6.283185307179586f / inv;
    if (wave < c->rope_original / c->rope_high) return inv;
    if (wave > c->rope_original / c->rope_low) return inv / c->rope_factor;
    float smooth = (c->rope_original / wave - c->rope_low) / (c->rope_high - c->rope_low);
    return (1.0f - smooth) * inv / c->rope_factor + smooth * inv;
}

/* Cosines and sines of positions below len, tables [len][rot/2], from the angles that c says. */
static void model_rope_fill(const model_cfg *c, int len, float *cosine, float *sine) {
    int half = c->rot / 2;
    for (int p = 0; p < len; p++)
        for (int j = 0; j < half; j++) {
            size_t i = (size_t)p * (size_t)half + (size_t)j;
            v_sincos1((float)p * model_rope_frequency(c, j), sine + i, cosine + i);
        }
}

/* Tables of the rotation for positions below len, in `keep`; local layers may have their own. They
 * grow by doubling; outgrown ones, together no larger than the newest, stay until the model
 * goes. */
static void model_rope_tables(rlhf_model *m, int len) {
    if (m->c.learned_pos || len <= m->rope_len) return;
    size_t half = (size_t)m->c.rot / 2;
    int want = base_min(m->c.positions, base_max(len, 2 * m->rope_len));
    model_cfg local = m->c;
    local.theta = m->c.local_theta;
    local.rope_factor = 0;
    for (int i = 0; i < 1 + (m->c.local_theta != 0); i++) {
        m->cosine[i] = arena_floats(&m->keep, (size_t)want, half);
        m->sine[i] = arena_floats(&m->keep, (size_t)want, half);
        model_rope_fill(i ? &local : &m->c, want, m->cosine[i], m->sine[i]);
    }
    m->rope_len = want;
}

/* ---- forward ---- */

/* What backward needs of a layer; [rows][...] as the operations of 09 and 10 have them. Below the
 * line what all layers share, since it is cheaper made again than kept. */
typedef struct model_acts {
    float *x1, *mean1, *rstd1;    /* input of the layer; statistics of its norm */
    float *qkv, *o, *lse;         /* as in op_attn; qkv is rotated */
    float *raw, *mean_h, *rstd_h; /* qkv before the norms of heads; their statistics */
    float *x2, *mean2, *rstd2;    /* after attention; statistics of its norm */
    float *up;                    /* MLP before its activation */
    float *y1, *y2;               /* what attention and MLP add to x, before the norms of that */
    float *mean_y1, *rstd_y1, *mean_y2, *rstd_y2;
    /* ---- */
    float *h;    /* a norm: what attention or MLP reads */
    float *act;  /* MLP after its activation */
    op_seq *seq; /* the run's, with keys and values of the layer at hand */
} model_acts;

/* One pass over a ragged batch. */
typedef struct model_run {
    int rows, seqs;
    const int32_t *ids, *pos; /* [rows] */
    const op_seq *seq;        /* [seqs]; kv is filled per layer */
    op_kv *kv;                /* [layers][seqs], caches that outlive the pass; null: scratch */
    int save;                 /* keep what backward needs: model_for_training */
    int recompute;            /* with save: only the layers' inputs, the rest is computed again */
    op_drop drop;             /* of adapters, with save */
    model_acts *acts;         /* [layers] */
    float *x;                 /* out: residual stream behind the last layer, [rows][d] */
} model_run;

/* Keys and values for cap positions, in ws; undefined until they are appended. */
static op_kv model_kv_new(rlhf_model *m, arena *ws, int cap) {
    op_kv kv = {.cap = (int)base_round_up((size_t)cap, RLHF_LANES)};
    kv.k = arena_floats(ws, op_kv_k_size(m->c.kv_heads, m->c.hd, kv.cap), 1);
    kv.v = arena_floats(ws, op_kv_v_size(m->c.kv_heads, m->c.hd, kv.cap), 1);
    return kv;
}

/* Throws unless every id is in the vocabulary and every sequence fits the positions: all that the
 * passes below rely on. */
static void model_check_run(rlhf_model *m, const model_run *run) {
    for (int i = 0; i < run->rows; i++)
        if (run->ids[i] < 0 || run->ids[i] >= m->c.vocab)
            err_throw(m->ctx, RLHF_ERR_ARG, "token id %d is not below the vocabulary size %d",
                      (int)run->ids[i], m->c.vocab);
    for (int i = 0; i < run->seqs; i++)
        if (run->seq[i].past + run->seq[i].n > m->c.positions)
            err_throw(m->ctx, RLHF_ERR_CONTEXT,
                      "a sequence of %d tokens: the model has %d positions",
                      run->seq[i].past + run->seq[i].n, m->c.positions);
}

/* Attention of one layer's rows and its description, shared with backward. */
static op_attn model_attn(rlhf_model *m, const model_run *run, int layer, model_acts *a) {
    const model_cfg *c = &m->c;
    int local = model_is(c, layer, MODEL_LOCAL), table = local && c->local_theta != 0;
    int turn = !c->learned_pos && !model_is(c, layer, MODEL_NOPE);
    return (op_attn){.kt = m->ctx->k,
                     .heads = m->c.heads,
                     .kv_heads = m->c.kv_heads,
                     .hd = m->c.hd,
                     .seqs = run->seqs,
                     .seq = a->seq,
                     .qkv = a->qkv,
                     .o = a->o,
                     .lse = a->lse,
                     .cosine = turn ? m->cosine[table] : NULL,
                     .sine = m->sine[table],
                     .rot = c->rot,
                     .window = local ? c->window : 0,
                     .scale = c->attn_scale,
                     .cap = c->attn_cap,
                     .pos = run->pos,
                     .sign = 1,
                     .rows = run->rows};
}

/* Buffers of one layer; first: those of the first, or null. Where nothing is kept of a layer they
 * serve every one. */
static model_acts model_acts_new(rlhf_model *m, arena *ws, const model_run *run,
                                 const model_acts *first) {
    const model_cfg *c = &m->c;
    int save = run->save && !run->recompute;
    size_t n = (size_t)run->rows, d = (size_t)c->d, q = (size_t)(c->heads * c->hd);
    model_acts a = {0};
    a.mean1 = arena_floats(ws, n, 4);
    a.rstd1 = a.mean1 + n;
    a.mean2 = a.rstd1 + n;
    a.rstd2 = a.mean2 + n;
    a.qkv = a.raw = arena_floats(ws, n, q + 2 * (size_t)(c->kv_heads * c->hd));
    if (c->qk_norm) {
        size_t per = (size_t)(c->heads + c->kv_heads);
        if (save) a.raw = arena_floats(ws, n, q + 2 * (size_t)(c->kv_heads * c->hd));
        a.mean_h = arena_floats(ws, n, 2 * per);
        a.rstd_h = a.mean_h + n * per;
    }
    if (c->post_norms) {
        a.y1 = arena_floats(ws, n, d);
        a.y2 = save ? arena_floats(ws, n, d) : a.y1;
        a.mean_y1 = arena_floats(ws, n, 4);
        a.rstd_y1 = a.mean_y1 + n;
        a.mean_y2 = a.rstd_y1 + n;
        a.rstd_y2 = a.mean_y2 + n;
    }
    a.o = arena_floats(ws, n, q);
    a.lse = save ? arena_floats(ws, n, (size_t)c->heads) : NULL;
    a.up = arena_floats(ws, n, (size_t)(c->ff * (1 + c->glu)));
    a.h = first ? first->h : arena_floats(ws, n, d);
    a.act = first ? first->act : arena_floats(ws, n, (size_t)c->ff);
    a.seq = first ? first->seq : arena_alloc(ws, (size_t)run->seqs * sizeof *a.seq);
    if (!first) memcpy(a.seq, run->seq, (size_t)run->seqs * sizeof *a.seq);
    return a;
}

/* The norm of all queries (p P_QN_W) or keys (P_KN_W), each head by itself, from raw to qkv. */
static op_norm model_head_norm(rlhf_model *m, int p, int layer, int rows, const model_acts *a) {
    const model_cfg *c = &m->c;
    int key = p == P_KN_W;
    op_norm o = model_norm(m, p, layer, rows * (key ? c->kv_heads : c->heads));
    size_t at = key ? (size_t)(c->heads * c->hd) : 0, row = key ? (size_t)(rows * c->heads) : 0;
    o.n = c->hd;
    o.per = key ? c->kv_heads : c->heads;
    o.ld = (size_t)((c->heads + 2 * c->kv_heads) * c->hd);
    o.x = a->raw + at, o.y = a->qkv + at;
    o.mean = a->mean_h + row, o.rstd = a->rstd_h + row;
    return o;
}

/* Copies the values of all rows: what the norms of heads leave as it is. */
static void model_copy_values(const model_cfg *c, int rows, const float *from, float *to) {
    size_t n = (size_t)(c->kv_heads * c->hd), at = (size_t)((c->heads + c->kv_heads) * c->hd);
    for (size_t r = 0; r < (size_t)rows && from != to; r++)
        memcpy(to + r * (at + n) + at, from + r * (at + n) + at, n * sizeof *to);
}

/* The norm of what attention (p P_PN1_W) or MLP (P_PN2_W) adds to x; the caller sets the rest. */
static op_norm model_post_norm(rlhf_model *m, int p, int layer, int rows, const model_acts *a) {
    op_norm o = model_norm(m, p, layer, rows);
    o.x = p == P_PN1_W ? a->y1 : a->y2;
    o.mean = p == P_PN1_W ? a->mean_y1 : a->mean_y2;
    o.rstd = p == P_PN1_W ? a->rstd_y1 : a->rstd_y2;
    return o;
}

/* The end of a branch: out = x + in W^T + b, where the sum's second part is normed if the family
 * has p. */
static void model_branch(rlhf_model *m, op_env *e, int p, int layer, int rows, const model_acts *a,
                         const op_weight *w, const float *in, const float *x, float *out) {
    if (!m->c.post_norms) {
        op_linear(e, w, rows, in, out, x, NULL, NULL);
        return;
    }
    arena_mark mark = arena_save(e->ws);
    op_norm o = model_post_norm(m, p, layer, rows, a);
    op_linear(e, w, rows, in, p == P_PN1_W ? a->y1 : a->y2, NULL, NULL, NULL);
    o.y = arena_floats(e->ws, (size_t)rows, (size_t)m->c.d);
    o.add = x, o.sum = out;
    op_norm_fwd(e, &o);
    arena_restore(e->ws, mark);
}

/* The norms that attention (P_LN1_W) and MLP (P_LN2_W) read, from the residual stream to a->h. */
static op_norm model_layer_norm(rlhf_model *m, int p, int layer, int rows, const model_acts *a) {
    int second = p == P_LN2_W;
    op_norm o = model_norm(m, p, layer, rows);
    o.x = second && !m->c.parallel ? a->x2 : a->x1;
    o.y = a->h;
    o.mean = second ? a->mean2 : a->mean1;
    o.rstd = second ? a->rstd2 : a->rstd1;
    return o;
}

/* One layer; x is the residual stream, n rows:
 *     h = norm(x)                          [n][d]
 *     qkv = h Wqkv^T + b, rotated          [n][(heads + 2 kv_heads) hd]
 *     o = attention(qkv)                   [n][heads hd]
 *     x += o Wo^T + b, h = norm(x)         [n][d], h from the first x where parallel
 *     up = h Wup^T + b                     [n][ff], with glu [n][2 ff]
 *     act = act(up) or act(gate) up        [n][ff]
 *     x += act Wdown^T + b                 [n][d]
 * With save, each state of x is kept. */
static void model_layer_fwd(rlhf_model *m, op_env *e, model_run *run, int layer, model_acts *a) {
    const model_cfg *c = &m->c;
    const k_table *k = m->ctx->k;
    int n = run->rows;
    /* What is trained changes too soon for panels to be kept. */
    int panel_rows = run->save && !m->base ? INT_MAX : n;
    /* Keys and values: the caller's caches, or one set for all layers. */
    for (int s = 0; s < run->seqs; s++) {
        if (run->kv) a->seq[s].kv = run->kv[(size_t)layer * (size_t)run->seqs + (size_t)s];
        else if (!a->seq[s].kv.k) a->seq[s].kv = model_kv_new(m, e->ws, a->seq[s].n);
    }
    /* Attention: norm, queries keys values, their norms, rotation, attention. */
    op_norm n1 = model_layer_norm(m, P_LN1_W, layer, n, a);
    op_norm_fwd(e, &n1);
    op_weight qkv = model_weight(m, P_QKV_W, P_QKV_B, layer, panel_rows),
              o = model_weight(m, P_O_W, P_O_B, layer, panel_rows);
    op_linear(e, &qkv, n, a->h, a->raw, NULL, NULL, NULL);
    if (c->qk_norm) {
        op_norm q = model_head_norm(m, P_QN_W, layer, n, a);
        op_norm key = model_head_norm(m, P_KN_W, layer, n, a);
        op_norm_fwd(e, &q);
        op_norm_fwd(e, &key);
        model_copy_values(c, n, a->raw, a->qkv);
    }
    op_attn at = model_attn(m, run, layer, a);
    op_rope(e, &at);
    op_attn_fwd(e, &at);
    /* The MLP's norm, before x changes where it reads the layer's input; attention added to x. */
    op_norm n2 = model_layer_norm(m, P_LN2_W, layer, n, a);
    if (c->parallel) op_norm_fwd(e, &n2);
    model_branch(m, e, P_PN1_W, layer, n, a, &o, a->o, a->x1, a->x2);
    if (!c->parallel) op_norm_fwd(e, &n2);
    /* MLP: up with its activation, down added to x. */
    op_weight up = model_weight(m, P_UP_W, P_UP_B, layer, panel_rows);
    op_weight down = model_weight(m, P_DOWN_W, P_DOWN_B, layer, panel_rows);
    k_map_fn *act = c->act == ACT_GELU_ERF ? k->gelu_erf : k->gelu;
    op_linear(e, &up, n, a->h, a->up, NULL, c->glu ? NULL : act, a->act);
    if (c->glu) {
        op_glu glu = {.act = c->act == ACT_SILU ? k->glu : k->geglu, .ff = c->ff};
        glu.up = a->up, glu.y = a->act;
        par_for(m->ctx, n, par_grain(4 * c->ff), op_glu_rows, &glu);
    }
    model_branch(m, e, P_PN2_W, layer, n, a, &down, a->act, a->x2, run->x);
}

/* Has the coming pass keep what a backward pass needs. With first >= 0 adapters drop elements:
 * sequence i of the batch is number first + i of an optimizer step whose seed is given, so that the
 * way a step is cut into batches changes nothing. */
static void model_for_training(const rlhf_model *m, arena *ws, model_run *run, uint64_t seed,
                               int first) {
    run->save = 1;
    run->recompute = m->recompute;
    if (!m->c.lora.r || m->c.lora.dropout <= 0 || first < 0) return;
    uint64_t *key = arena_alloc(ws, (size_t)run->rows * sizeof *key);
    for (int s = 0; s < run->seqs; s++)
        for (int i = 0; i < run->seq[s].n; i++)
            key[run->seq[s].row + i] = (uint64_t)(first + s) << 44 | (uint64_t)i << 22;
    run->drop = (op_drop){m->c.lora.dropout, seed, key};
}

/* Runs the batch through all layers: run->x becomes the residual stream behind the last one,
 * [rows][d], run->acts what backward needs. Everything it allocates lies in ws, above what is
 * there, and is the caller's to restore. With run->kv the rows continue their sequences' caches. */
static void model_forward(rlhf_model *m, arena *ws, model_run *run) {
    const model_cfg *c = &m->c;
    model_check_run(m, run);
    int longest = 0;
    for (int i = 0; i < run->seqs; i++)
        longest = base_max(longest, run->seq[i].past + run->seq[i].n);
    model_rope_tables(m, longest);
    op_env e = {m->ctx, ws};
    size_t rows = (size_t)run->rows, d = (size_t)c->d;
    run->acts = arena_alloc(ws, (size_t)c->layers * sizeof *run->acts);
    float *x = arena_floats(ws, rows, d);
    m->drop = run->save && run->drop.p > 0 ? &run->drop : NULL;
    /* Embedding. */
    op_weight wte = model_weight(m, P_WTE, P_COUNT, 0, INT_MAX);
    op_embed em = {.k = m->ctx->k,
                   .rows = run->rows,
                   .d = c->d,
                   .ids = run->ids,
                   .pos = run->pos,
                   .wte = &wte,
                   .wpe = model_w(m, P_WPE, 0),
                   .scale = c->embed_scale,
                   .x = x};
    op_embed_fwd(&e, &em);
    run->x = x;
    /* With save every layer has its own buffers and every state of x its own copy, or only its
     * input has. */
    int save = run->save && !run->recompute;
    for (int l = 0; l < c->layers; l++) {
        if (save || l == 0) run->acts[l] = model_acts_new(m, ws, run, l ? run->acts : NULL);
        else run->acts[l] = run->acts[0];
        model_acts *a = run->acts + l;
        a->x1 = run->x;
        if (save) a->x2 = arena_floats(ws, rows, d);
        if (run->save) run->x = arena_floats(ws, rows, d);
        if (!save) a->x2 = run->x;
        model_layer_fwd(m, &e, run, l, a);
    }
}

/* ---- backward ---- */

/* The gradient of a branch's last product, given that of x: the same, or through its norm p. */
static const float *model_branch_bwd(rlhf_model *m, op_env *e, int p, int layer, int rows,
                                     const model_acts *a, const float *dx) {
    if (!m->c.post_norms) return dx;
    op_norm o = model_post_norm(m, p, layer, rows, a);
    o.dy = dx;
    o.dx = arena_zeros(e->ws, (size_t)rows, (size_t)m->c.d);
    op_norm_bwd(e, &o);
    return o.dx;
}

/* dup, the gradient of an MLP's matrices up and gate, from that of the activation's output dact,
 * which is destroyed; and that output, a->act, again. */
static float *model_act_bwd(rlhf_model *m, op_env *e, int rows, const model_acts *a, float *dact) {
    const model_cfg *c = &m->c;
    const k_table *k = m->ctx->k;
    if (!c->glu) {
        op_gelu gelu = {c->act == ACT_GELU_ERF ? k->gelu_erf_bwd : k->gelu_bwd, c->ff, a->up, dact,
                        a->act};
        par_for(m->ctx, rows, par_grain(4 * c->ff), op_gelu_bwd_rows, &gelu);
        return dact;
    }
    op_glu glu = {.act_bwd = c->act == ACT_SILU ? k->glu_bwd : k->geglu_bwd, .ff = c->ff};
    glu.up = a->up, glu.dy = dact, glu.y = a->act;
    glu.dup = arena_floats(e->ws, (size_t)rows, 2 * (size_t)c->ff);
    par_for(m->ctx, rows, par_grain(4 * c->ff), op_glu_bwd_rows, &glu);
    return glu.dup;
}

/* The gradient of raw from that of qkv, rotation undone: through the norms of heads, where there
 * are any. */
static float *model_heads_bwd(rlhf_model *m, op_env *e, int layer, int rows, const model_acts *a,
                              float *dqkv) {
    const model_cfg *c = &m->c;
    if (!c->qk_norm) return dqkv;
    float *d = arena_zeros(e->ws, (size_t)rows, (size_t)((c->heads + 2 * c->kv_heads) * c->hd));
    for (int p = P_QN_W; p <= P_KN_W; p++) {
        op_norm o = model_head_norm(m, p, layer, rows, a);
        o.dy = dqkv + (o.x - a->raw);
        o.dx = d + (o.x - a->raw);
        op_norm_bwd(e, &o);
    }
    model_copy_values(c, rows, dqkv, d);
    return d;
}

_Static_assert(P_KN_W == P_QN_W + 1, "the loop above");

/* dx [rows][d], the gradient of run->x, becomes that of the layer's input; weight gradients are
 * added to m->g. The residual connections are why dx is added to: a branch's gradient joins what
 * flows past it. Runs the forward steps backward: down, activation, up, norm; o, attention,
 * rotation, qkv, norm. */
static void model_layer_bwd(rlhf_model *m, op_env *e, const model_run *run, int layer, float *dx) {
    const model_cfg *c = &m->c;
    model_acts *a = run->acts + layer;
    arena_mark mark = arena_save(e->ws);
    int n = run->rows;
    size_t rows = (size_t)n;
    op_weight qkv = model_weight(m, P_QKV_W, P_QKV_B, layer, INT_MAX),
              o = model_weight(m, P_O_W, P_O_B, layer, INT_MAX);
    op_weight up = model_weight(m, P_UP_W, P_UP_B, layer, INT_MAX);
    op_weight down = model_weight(m, P_DOWN_W, P_DOWN_B, layer, INT_MAX);

    /* MLP branch. */
    const float *dy = model_branch_bwd(m, e, P_PN2_W, layer, n, a, dx);
    float *dact = arena_floats(e->ws, rows, (size_t)c->ff);
    op_linear_bwd_x(e, &down, n, dy, dact);
    float *dup = model_act_bwd(m, e, n, a, dact);
    op_linear_bwd_w(e, &down, n, a->act, dy);
    op_norm n2 = model_layer_norm(m, P_LN2_W, layer, n, a);
    op_norm_fwd(e, &n2);
    op_linear_bwd_w(e, &up, n, a->h, dup);
    float *dh = arena_floats(e->ws, rows, (size_t)c->d);
    op_linear_bwd_x(e, &up, n, dup, dh);
    /* Both norms add to dx, which still holds what the residual connection passes on: to attention
     * behind this one, or in parallel before it. */
    n2.dy = dh, n2.dx = dx;
    if (!c->parallel) op_norm_bwd(e, &n2);

    /* Attention branch. */
    dy = model_branch_bwd(m, e, P_PN1_W, layer, n, a, dx);
    op_linear_bwd_w(e, &o, n, a->o, dy);
    float *dout = arena_floats(e->ws, rows, (size_t)(c->heads * c->hd));
    op_linear_bwd_x(e, &o, n, dy, dout);
    if (c->parallel) op_norm_bwd(e, &n2);
    op_attn at = model_attn(m, run, layer, a);
    at.dout = dout;
    at.dqkv = arena_floats(e->ws, rows, (size_t)op_attn_width(&at));
    op_attn_bwd(e, &at);
    /* The rotation undone on the gradients of queries and keys. */
    op_attn back = at;
    back.qkv = at.dqkv;
    back.sign = -1;
    op_rope(e, &back);
    float *draw = model_heads_bwd(m, e, layer, n, a, at.dqkv);
    op_norm n1 = model_layer_norm(m, P_LN1_W, layer, n, a);
    op_norm_fwd(e, &n1);
    op_linear_bwd_w(e, &qkv, n, a->h, draw);
    op_linear_bwd_x(e, &qkv, n, draw, dh);
    n1.dy = dh, n1.dx = dx;
    op_norm_bwd(e, &n1);
    arena_restore(e->ws, mark);
}

/* A layer's forward pass once more, from its input, into new buffers. */
static void model_layer_again(rlhf_model *m, op_env *e, const model_run *run, int layer) {
    model_run again = *run;
    size_t rows = (size_t)run->rows, d = (size_t)m->c.d;
    again.recompute = 0;
    model_acts a = model_acts_new(m, e->ws, &again, NULL);
    a.x1 = run->acts[layer].x1;
    a.x2 = arena_floats(e->ws, rows, d);
    again.x = arena_floats(e->ws, rows, d);
    model_layer_fwd(m, e, &again, layer, &a);
    run->acts[layer] = a;
}

/* Adds the gradients of all weights below run->x, given its gradient dx (destroyed). run went
 * through model_forward with save. Where WTE is the head too, the embedding's part goes to g_embed
 * (opt_join says why). */
static void model_backward(rlhf_model *m, arena *ws, const model_run *run, float *dx) {
    op_env e = {m->ctx, ws};
    m->drop = run->drop.p > 0 ? &run->drop : NULL;
    for (int l = m->c.layers - 1; l >= 0; l--) {
        arena_mark mark = arena_save(ws);
        if (run->recompute) model_layer_again(m, &e, run, l);
        model_layer_bwd(m, &e, run, l, dx);
        arena_restore(ws, mark);
    }
    op_embed em = {.k = m->ctx->k,
                   .rows = run->rows,
                   .d = m->c.d,
                   .ids = run->ids,
                   .pos = run->pos,
                   .wpe = model_w(m, P_WPE, 0),
                   .gwte = model_g(m, P_WTE, 0),
                   .sparse = m->g_embed,
                   .gwpe = model_g(m, P_WPE, 0),
                   .scale = m->c.embed_scale,
                   .x = dx};
    op_embed_bwd(&e, &em);
}

/* ---- heads ---- */

/* The final norm of chosen rows, which is all that a head sees: rows that bear no loss never meet
 * the vocabulary. */
typedef struct model_top {
    int n;
    const int *row;
    float *x, *h, *mean, *rstd; /* gathered residual rows, their norm [n][d] */
} model_top;

/* Gathers n rows of x and norms them. row must outlive the result; a row may be chosen once. */
static model_top model_top_fwd(rlhf_model *m, arena *ws, const float *x, const int *row, int n) {
    op_env e = {m->ctx, ws};
    size_t d = (size_t)m->c.d;
    model_top t = {.n = n, .row = row};
    t.x = arena_floats(ws, (size_t)n, d);
    t.h = arena_floats(ws, (size_t)n, d);
    t.mean = arena_floats(ws, (size_t)n, 2);
    t.rstd = t.mean + n;
    for (int i = 0; i < n; i++)
        memcpy(t.x + (size_t)i * d, x + (size_t)row[i] * d, d * sizeof(float));
    op_norm o = model_norm(m, P_LNF_W, 0, n);
    o.x = t.x, o.y = t.h, o.mean = t.mean, o.rstd = t.rstd;
    op_norm_fwd(&e, &o);
    return t;
}

/* dx [rows][d] of the residual stream, zero but for the chosen rows, from dh [n][d]. */
static float *model_top_bwd(rlhf_model *m, arena *ws, const model_top *t, const float *dh,
                            int rows) {
    op_env e = {m->ctx, ws};
    size_t d = (size_t)m->c.d;
    /* The norm's backward adds, hence zeros; chosen rows differ, hence copies. */
    float *dx = arena_zeros(ws, (size_t)rows, d), *part = arena_zeros(ws, (size_t)t->n, d);
    op_norm o = model_norm(m, P_LNF_W, 0, t->n);
    o.x = t->x, o.mean = t->mean, o.rstd = t->rstd, o.dy = dh, o.dx = part;
    op_norm_bwd(&e, &o);
    for (int i = 0; i < t->n; i++)
        memcpy(dx + (size_t)t->row[i] * d, part + (size_t)i * d, d * sizeof(float));
    return dx;
}

/* Raw scores [n] of the chosen rows. */
static void model_scores(rlhf_model *m, arena *ws, const model_top *t, float *score) {
    op_env e = {m->ctx, ws};
    op_weight w = model_head_weight(m, t->n);
    op_linear(&e, &w, t->n, t->h, score, NULL, NULL, NULL);
}

/* Backward of model_scores: adds to the head's gradient, given dscore = d loss / d score [n], and
 * sets dh [n][d], that of the chosen rows' norm. */
static void model_scores_bwd(rlhf_model *m, arena *ws, const model_top *t, const float *dscore,
                             float *dh) {
    op_env e = {m->ctx, ws};
    op_weight w = model_head_weight(m, t->n);
    op_linear_bwd_w(&e, &w, t->n, t->h, dscore);
    op_linear_bwd_x(&e, &w, t->n, dscore, dh);
}

/* ---- batches ---- */

/* Token sequences ids[i][len[i]] as one ragged batch that starts at position 0. Arrays lie in
 * ws. */
static model_run model_batch(arena *ws, int seqs, const int32_t *const *ids, const int *len) {
    model_run run = {.seqs = seqs};
    for (int i = 0; i < seqs; i++) run.rows += len[i];
    int32_t *id = arena_alloc(ws, (size_t)run.rows * sizeof *id);
    int32_t *pos = arena_alloc(ws, (size_t)run.rows * sizeof *pos);
    op_seq *seq = arena_alloc(ws, (size_t)seqs * sizeof *seq);
    /* Positions begin at 0 in each sequence: nothing of a sequence depends on its neighbours. */
    int row = 0;
    for (int i = 0; i < seqs; i++) {
        seq[i] = (op_seq){.row = row, .n = len[i]};
        for (int t = 0; t < len[i]; t++, row++) {
            id[row] = ids[i][t];
            pos[row] = t;
        }
    }
    run.ids = id;
    run.pos = pos;
    run.seq = seq;
    return run;
}

/* ---- memory ---- */

/* Floats for each row that a pass through `layers` layers takes: what model_acts_new and its
 * callers ask for, and keys and values. save: every layer keeps what is its own. */
static size_t model_row_floats(const rlhf_model *m, int save, size_t layers) {
    const model_cfg *c = &m->c;
    size_t d = (size_t)c->d, q = (size_t)(c->heads * c->hd), kv = (size_t)(c->kv_heads * c->hd);
    size_t ff = (size_t)c->ff, n = 4 + 2 * q + 2 * kv + ff * (size_t)(1 + c->glu);
    if (save) n += 2 * d + (size_t)c->heads;
    if (c->qk_norm) n += (save ? q + 2 * kv : 0) + 2 * (size_t)(c->heads + c->kv_heads);
    if (c->post_norms) n += d * (save ? 2 : 1) + 4;
    return n * (save ? layers : 1) + d + ff + 2 * kv;
}

/* Floats that the backward pass of a layer takes for each row. */
static size_t model_row_back(const rlhf_model *m) {
    const model_cfg *c = &m->c;
    size_t d = (size_t)c->d, q = (size_t)(c->heads * c->hd), ff = (size_t)c->ff;
    size_t w = q + 2 * (size_t)(c->kv_heads * c->hd), n = ff * (size_t)(1 + 2 * c->glu) + d + q + w;
    if (c->qk_norm) n += w;
    if (c->post_norms) n += 2 * d;
    if (c->lora.r) n += 2 * (size_t)c->lora.r + (c->lora.dropout > 0 ? ff : 0);
    return n;
}

/* Floats of logits that a chunk of n scored rows takes, by one model or two. */
static size_t model_head_floats(const rlhf_model *m, int n, int models) {
    if (m->c.head != RLHF_HEAD_LM) return 0;
    return (size_t)(models * op_vocab_chunk(m->c.vocab, n, models)) *
           (size_t)(m->c.vocab + 2 * RLHF_LANES);
}

/* Bytes that products take beside their operands: blocks of each thread, weights that are widened.
 */
static size_t model_scratch(const rlhf_model *m) {
    size_t block = m->ctx->cache / 2 + (size_t)GEMM_MAX_PANELS * RLHF_LANES * GEMM_DEPTH * 4;
    int widen = m->base && m->base->stored[0] && m->base->stored[0] != '4';
    return (size_t)m->ctx->threads * block + (widen ? (size_t)OP_WIDEN * 4 : 0);
}

/* Bytes that a pass takes at its highest, apart by kind; their sum is what counts. */
typedef struct model_need {
    size_t acts, cache, scratch;
} model_need;

/* A training pass over `rows` tokens, all of which meet the head. */
static model_need model_need_training(const rlhf_model *m, int rows) {
    size_t d = (size_t)m->c.d, layers = (size_t)m->c.layers, r = (size_t)rows;
    size_t kept = d + model_row_floats(m, !m->recompute, layers);
    size_t back = d + model_row_back(m);
    if (m->recompute) kept += layers * d, back += model_row_floats(m, 1, 1);
    size_t head = m->c.head == RLHF_HEAD_LM ? model_head_floats(m, rows, 1) : 0;
    size_t top = 3 * d * r;
    /* Logits are gone before the backward pass through the layers begins. */
    model_need o = {4 * (r * kept + top), 0, model_scratch(m)};
    if (head > r * back) o.scratch += 4 * head;
    else o.acts += 4 * r * back;
    return o;
}

/* A pass without backward over `rows` tokens whose logits are compared with another model's, or
 * (compare 0) not asked for. */
static model_need model_need_scoring(const rlhf_model *m, int rows, int compare) {
    size_t d = (size_t)m->c.d, r = (size_t)rows;
    model_need o = {4 * r * (model_row_floats(m, 0, 1) + 3 * d), 0, model_scratch(m)};
    if (compare) o.scratch += 4 * model_head_floats(m, rows, 2);
    return o;
}

/* Tokens of a batch from which nothing is trained: its buffers take 64 MiB at most, since more rows
 * at once make no product faster. */
static int model_batch_tokens(const rlhf_model *m) {
    size_t most = ((size_t)64 << 20) / (4 * (model_row_floats(m, 0, 1) + 3 * (size_t)m->c.d));
    return most < 4096 ? base_max((int)most, 64) : 4096;
}

/* Sampling in `slots` rows of up to `len` tokens, from prompts of up to `prompt`. */
static model_need model_need_sampling(const rlhf_model *m, int slots, int prompt, int len) {
    size_t cap = base_round_up((size_t)len, RLHF_LANES), n = (size_t)slots;
    size_t kv = 2 * (size_t)m->c.layers * (size_t)(m->c.kv_heads * m->c.hd) * cap;
    int fresh = base_max(base_min(slots * prompt, model_batch_tokens(m)), prompt);
    model_need o = model_need_scoring(m, fresh + slots, 0);
    o.cache = 4 * n * kv;
    o.scratch += 4 * n * (size_t)m->c.vocab;
    return o;
}

/* Bytes of panels that products of few rows leave behind, for matrices that the model owns or for
 * those of its base. */
static size_t model_panel_bytes(const rlhf_model *m, int base) {
    size_t n = 0;
    if (base && !(m->base && m->base->keep_packed)) return 0;
    for (int p = 0; p < P_COUNT; p++) {
        model_where where = base ? MODEL_FILE : MODEL_OWN;
        int layers = m->slot[p].where == where ? model_param_layers(m, p) : 0;
        if (m->slot[p].cols == 1 || p == P_WPE || model_param_info[p].init == 'a' ||
            model_param_info[p].init == 'b' || p == P_SCORE)
            continue;
        if (p == P_WTE && (!m->c.tied || m->c.head != RLHF_HEAD_LM)) continue;
        n += (size_t)layers *
             gemm_packed_size(m->ctx->k, m->half, m->slot[p].cols, m->slot[p].rows) * sizeof(float);
    }
    return n;
}

/* How many of the sequences from `from` on make the next piece of up to `most` tokens, at least
 * one. The last two pieces are equal as far as sequences can be: products of few rows are slow.
 * How a batch is cut changes memory and time, not results. */
static int model_cut(const int *len, int from, int n, int64_t most) {
    int64_t rest = 0, tokens = 0;
    int i = from;
    for (int k = from; k < n && rest <= 2 * most; k++) rest += len[k];
    int64_t enough = rest > most && rest <= 2 * most ? (rest + 1) / 2 : most;
    while (i < n && (i == from || (tokens < enough && tokens + len[i] <= most))) tokens += len[i++];
    return i - from;
}

/* The same for a batch from which nothing is trained. */
static int model_batch_count(const rlhf_model *m, const int *len, int from, int n) {
    return model_cut(len, from, n, model_batch_tokens(m));
}

/* Raw scores at the last token of n sequences, in batches; len[i] >= 1. */
static void model_score_list(rlhf_model *m, arena *ws, int n, const int32_t *const *ids,
                             const int *len, float *score) {
    for (int at = 0, k; at < n; at += k) {
        k = model_batch_count(m, len, at, n);
        arena_mark mark = arena_save(ws);
        model_run run = model_batch(ws, k, ids + at, len + at);
        int *row = arena_alloc(ws, (size_t)k * sizeof *row);
        /* The last token's state has seen the whole sequence. */
        for (int i = 0; i < k; i++) row[i] = run.seq[i].row + run.seq[i].n - 1;
        model_forward(m, ws, &run);
        model_top top = model_top_fwd(m, ws, run.x, row, k);
        model_scores(m, ws, &top, score + at);
        arena_restore(ws, mark);
    }
}

/* The reward of a raw score: the normalisation that rm_normalize measured. */
static float model_reward(const rlhf_model *m, float score) {
    return (score - m->score_mean) / (m->score_std > 1e-8f ? m->score_std : 1e-8f);
}

/* Throws unless the model can score. */
static void model_need_score(const rlhf_model *m) {
    if (m->c.head != RLHF_HEAD_SCORE)
        err_throw(m->ctx, RLHF_ERR_ARG,
                  "the model is a language model; scoring needs a reward model (rlhf rm)");
    if (!m->score_trained)
        err_throw(m->ctx, RLHF_ERR_ARG,
                  "the score head was never trained (no score.weight in the checkpoint); train it "
                  "with rlhf rm");
}

/* Throws unless the model is a language model. */
static void model_need_lm(const rlhf_model *m) {
    if (m->c.head != RLHF_HEAD_LM)
        err_throw(m->ctx, RLHF_ERR_ARG, "the model is a reward model; this needs a language model");
}

/* Whether a token ends a text. */
static int model_is_eos(const rlhf_model *m, int32_t id) {
    for (int i = 0; i < m->n_eos; i++)
        if (m->eos[i] == id) return 1;
    return 0;
}

/* A hash of the weights: FNV-1a over their 32-bit patterns, parameter by parameter in table order.
 * Gaps and the layout's order are not part of it. */
static uint64_t model_hash(const rlhf_model *m) {
    uint64_t h = 14695981039346656037u;
    float w[256];
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_param_layers(m, p); l++) {
            int cols = m->slot[p].cols;
            for (size_t i = 0; i < m->slot[p].n;) {
                int from = (int)(i % (size_t)cols), n = base_min(256, cols - from);
                model_read(m, p, l, i / (size_t)cols, from, n, w);
                for (int j = 0; j < n; j++) h = (h ^ (uint32_t)v_int1(w[j])) * 1099511628211u;
                i += (size_t)n;
            }
        }
    return h;
}

/* ============================================================================================
 * MARK: - 19 CKPT (ckpt_)
 * safetensors files and Hugging Face model directories, in and out. Every offset and shape of a
 * file is checked before a byte is used; a tensor that is missing, unexpected or of another shape
 * is an error that names it.
 *
 * A safetensors file is a 64-bit little-endian length, so many bytes of JSON that give each
 * tensor's dtype, shape and range of bytes, then the bytes, little-endian too, as are the
 * processors of 01.
 *
 * Entry: ckpt_open_base, ckpt_save_model, ckpt_clone; ckpt_map, ckpt_write for any tensors.
 * Tests: test/test_model.c
 * ============================================================================================ */

/* dir/name, for the length of the public call. */
static char *ckpt_path(rlhf_ctx *ctx, const char *dir, const char *name) {
    return mem_temp(io_join(ctx, dir, name));
}

/* ---- safetensors ---- */

/* A mapped file whose header has been checked. */
typedef struct ckpt_file {
    json_src src; /* of its messages */
    const json_t *header;
    const unsigned char *data; /* behind the header */
    size_t size;               /* bytes at data */
} ckpt_file;

/* Bytes [from, to) of the data. */
typedef struct ckpt_span {
    size_t from, to;
} ckpt_span;

/* By where they begin. */
static int ckpt_compare_spans(const void *a, const void *b) {
    const ckpt_span *x = a, *y = b;
    return x->from < y->from ? -1 : x->from > y->from;
}

/* Bytes of one element, 0 for a name that the format does not have. */
static size_t ckpt_dtype_size(const char *dtype) {
    static const struct {
        const char *name;
        size_t size;
    } known[] = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},
                 {"I32", 4}, {"I16", 2}, {"I8", 1},  {"U8", 1},   {"BOOL", 1}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(dtype, known[i].name)) return known[i].size;
    return 0;
}

/* One entry's place, checked against its shape and the file: the product of the shape times the
 * size of an element is what the range holds, and the range lies in the data. */
static ckpt_span ckpt_entry_span(const ckpt_file *f, const char *name, const json_t *entry) {
    rlhf_ctx *ctx = f->src.ctx;
    json_src src = f->src;
    char at[256];
    snprintf(at, sizeof at, "%s.", name);
    src.at = at;
    const char *dtype = json_need_str(&src, entry, "dtype");
    json_t *shape = json_need_array(&src, entry, "shape"), *dim;
    json_t *offsets = json_need_array(&src, entry, "data_offsets");
    size_t n = ckpt_dtype_size(dtype), i;
    if (!n)
        err_throw(ctx, RLHF_ERR_UNSUPPORTED, "%s: tensor \"%s\": unknown dtype \"%s\"", f->src.file,
                  name, dtype);
    /* Bytes that the shape asks for; a product that overflows is a bad shape. */
    json_array_foreach(shape, i, dim) {
        json_int_t d = json_integer_value(dim);
        if (!json_is_integer(dim) || d < 0 || __builtin_mul_overflow(n, (size_t)d, &n))
            err_throw(ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\": bad shape", f->src.file, name);
    }
    json_int_t from = json_integer_value(json_array_get(offsets, 0));
    json_int_t to = json_integer_value(json_array_get(offsets, 1));
    if (json_array_size(offsets) != 2 || from < 0 || to < from || (size_t)to > f->size)
        err_throw(ctx, RLHF_ERR_FORMAT,
                  "%s: tensor \"%s\": data_offsets [%lld, %lld] do not lie in the file's %zu bytes "
                  "of data%s",
                  f->src.file, name, (long long)from, (long long)to, f->size,
                  to > from ? "; the file may be truncated" : "");
    if ((size_t)(to - from) != n)
        err_throw(
            ctx, RLHF_ERR_FORMAT,
            "%s: tensor \"%s\": its shape and dtype %s need %zu bytes, data_offsets hold %lld",
            f->src.file, name, dtype, n, (long long)(to - from));
    return (ckpt_span){(size_t)from, (size_t)to};
}

/* Throws unless every entry is well-formed and no two overlap, which would let one tensor's bytes
 * be read as another's. */
static void ckpt_check(const ckpt_file *f) {
    json_t *header = (json_t *)(uintptr_t)f->header, *entry;
    const char *name;
    ckpt_span *spans = mem_alloc(f->src.ctx, (json_object_size(header) + 1) * sizeof *spans);
    size_t n = 0;
    json_object_foreach(header, name, entry) {
        if (!strcmp(name, "__metadata__")) continue;
        if (!json_is_object(entry))
            err_throw(f->src.ctx, RLHF_ERR_FORMAT,
                      "%s: tensor \"%s\" is not described by an object", f->src.file, name);
        spans[n++] = ckpt_entry_span(f, name, entry);
    }
    qsort(spans, n, sizeof *spans, ckpt_compare_spans);
    for (size_t i = 1; i < n; i++)
        if (spans[i].from < spans[i - 1].to)
            err_throw(f->src.ctx, RLHF_ERR_FORMAT,
                      "%s: two tensors overlap at byte %zu of the data", f->src.file,
                      spans[i].from);
    mem_free(spans);
}

/* Maps the file and checks its header. Two resources are held: give them back with two err_release.
 */
static ckpt_file ckpt_map(rlhf_ctx *ctx, const char *path) {
    ckpt_file f = {.src = json_source(ctx, path)};
    const io_view *view = io_map(ctx, path);
    /* The header's length, byte by byte: no alignment, no trust. */
    uint64_t n = 0;
    if (view->size >= 8)
        for (int i = 7; i >= 0; i--) n = n << 8 | view->data[i];
    if (view->size < 8 || n > view->size - 8)
        err_throw(ctx, RLHF_ERR_FORMAT,
                  "%s: not a safetensors file, or truncated: its header of %llu bytes does not fit "
                  "into %zu bytes",
                  path, (unsigned long long)n, view->size);
    /* The mapping and the parsed header are the two resources. */
    f.header = json_parse(&f.src, (const char *)view->data + 8, (size_t)n);
    if (!json_is_object(f.header))
        err_throw(ctx, RLHF_ERR_FORMAT, "%s: the header is not a JSON object", path);
    f.data = view->data + 8 + n;
    f.size = view->size - 8 - (size_t)n;
    ckpt_check(&f);
    return f;
}

/* The nearest half-precision number, the even one of two; beyond the largest is infinity. */
static uint16_t ckpt_to_half(float f) {
    uint32_t x = (uint32_t)v_int1(f), sign = x >> 16 & 0x8000, a = x & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    /* Half the unit of 1/2 is that of denormals: the addition rounds to it. */
    if (a < 0x38800000)
        return (uint16_t)(sign | (uint32_t)(v_int1(v_bits1((int32_t)a) + 0.5f) - v_int1(0.5f)));
    return (uint16_t)(sign | (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13);
}

/* One tensor of a file: [rows][cols] floats, or their transpose; cols 0: [rows]. hd, if not 0: the
 * file has the rows of query, key and value of one head after another, hd each. kind: the dtype it
 * is written in, as in op_piece. The data stay the caller's; null: raw, rows in the file's own
 * order. */
typedef struct ckpt_tensor {
    char name[160];
    size_t rows, cols, hd;
    int transposed;
    char kind;
    float *data;
    op_piece raw;
} ckpt_tensor;

/* The tensor's shape in a file: rows, and 1 or the columns of each. */
static void ckpt_shape(const ckpt_tensor *t, size_t *a, size_t *b) {
    size_t cols = t->cols ? t->cols : 1;
    *a = t->transposed ? cols : t->rows;
    *b = t->transposed ? t->rows : cols;
}

/* A tensor of a file as a piece of t's matrix. Another shape than t's, or a dtype that is not read,
 * is an error. */
static op_piece ckpt_find(const ckpt_file *f, const json_t *entry, const ckpt_tensor *t) {
    rlhf_ctx *ctx = f->src.ctx;
    const char *name = t->name;
    const char *dtype = json_string_value(json_object_get(entry, "dtype"));
    op_piece o = {.rows = (int)t->rows, .cols = (int)(t->cols ? t->cols : 1), .hd = (int)t->hd};
    o.transposed = t->transposed;
    o.kind = !strcmp(dtype, "F32") ? '4' : !strcmp(dtype, "F16") ? 'h' : 'b';
    if (o.kind == 'b' && strcmp(dtype, "BF16") != 0)
        err_throw(ctx, RLHF_ERR_UNSUPPORTED,
                  "%s: tensor \"%s\" has dtype %s; F32, F16 and BF16 are read", f->src.file, name,
                  dtype);
    json_t *shape = json_object_get(entry, "shape");
    size_t nd = json_array_size(shape), a = (size_t)json_integer_value(json_array_get(shape, 0));
    size_t b = nd > 1 ? (size_t)json_integer_value(json_array_get(shape, 1)) : 1, want_a, want_b;
    ckpt_shape(t, &want_a, &want_b);
    if (nd != (t->cols ? 2u : 1u) || a != want_a || b != want_b) {
        char *found = json_text(ctx, shape, JSON_COMPACT, NULL);
        if (!t->cols)
            err_throw(ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\" has shape %s, expected [%zu]",
                      f->src.file, name, found, want_a);
        err_throw(ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\" has shape %s, expected [%zu,%zu]",
                  f->src.file, name, found, want_a, want_b);
    }
    /* ckpt_check has seen that the range is in the data and of this size. */
    o.data =
        f->data + json_integer_value(json_array_get(json_object_get(entry, "data_offsets"), 0));
    return o;
}

/* Where row r of a file lies in a parameter: hd as in ckpt_tensor. */
static size_t ckpt_row(size_t rows, size_t hd, size_t r) {
    if (!hd) return r;
    return r / hd % 3 * (rows / 3) + r / (3 * hd) * hd + r % hd;
}

/* Bytes of one number. */
static size_t ckpt_kind_size(char kind) { return kind == '4' ? 4 : 2; }

/* Whether a tensor can be read where it lies: files align nothing. */
static int ckpt_aligned(const op_piece *p) {
    return (uintptr_t)p->data % ckpt_kind_size(p->kind) == 0;
}

/* Copies a tensor to data as floats, rows in the model's order. */
static void ckpt_copy(rlhf_ctx *ctx, const op_piece *p, float *data) {
    size_t rows = (size_t)p->rows, cols = (size_t)p->cols;
    op_piece from = *p;
    unsigned char *bytes = NULL;
    if (!ckpt_aligned(p)) {
        bytes = mem_alloc(ctx, rows * cols * ckpt_kind_size(p->kind));
        from.data = memcpy(bytes, p->data, rows * cols * ckpt_kind_size(p->kind));
    }
    for (size_t r = 0; r < rows; r++)
        op_piece_read(ctx->k, &from, r, 0, p->cols, data + r * cols);
    mem_free(bytes);
}

/* Copies the tensor that t describes to t->data. */
static void ckpt_load(const ckpt_file *f, const json_t *entry, const ckpt_tensor *t) {
    op_piece piece = ckpt_find(f, entry, t);
    ckpt_copy(f->src.ctx, &piece, t->data);
}

/* Whether n numbers are the same again when they have been stored in a dtype. */
static int ckpt_fits(const float *x, size_t n, char kind) {
    for (size_t i = 0; i < n; i++) {
        float back = kind == 'h' ? op_half(ckpt_to_half(x[i])) : v_wide1(v_half1(x[i]));
        if (v_int1(back) != v_int1(x[i])) return 0;
    }
    return 1;
}

/* Row r of a file, of n numbers, from the tensor's data. */
static void ckpt_put_row(const ckpt_tensor *t, size_t r, size_t n, const k_table *k, float *row) {
    if (!t->data) {
        op_piece_read(k, &t->raw, r, 0, (int)n, row);
        return;
    }
    const float *x = t->data + (t->transposed ? r : ckpt_row(t->rows, t->hd, r) * n);
    size_t step = t->transposed ? (t->cols ? t->cols : 1) : 1;
    for (size_t i = 0; i < n; i++) row[i] = x[i * step];
}

/* Writes one tensor's data in its dtype, a row of the file at a time: no second copy of a large
 * matrix. What is in that dtype already is written as it is. */
static void ckpt_put(io_file *f, rlhf_ctx *ctx, const ckpt_tensor *t) {
    size_t a, n;
    ckpt_shape(t, &a, &n);
    int as_is = t->data ? t->kind == '4' && !t->transposed && !t->hd : t->kind == t->raw.kind;
    if (as_is) {
        io_write(f, t->data ? (const void *)t->data : t->raw.data,
                 a * n * ckpt_kind_size(t->kind));
        return;
    }
    float *row = mem_alloc(ctx, n * sizeof *row);
    uint16_t *half = mem_alloc(ctx, n * sizeof *half);
    for (size_t r = 0; r < a; r++) {
        ckpt_put_row(t, r, n, ctx->k, row);
        for (size_t i = 0; i < n && t->kind != '4'; i++)
            half[i] = t->kind == 'h' ? ckpt_to_half(row[i]) : v_half1(row[i]);
        if (t->kind == '4') io_write(f, row, n * sizeof *row);
        else io_write(f, half, n * sizeof *half);
    }
    mem_free(half);
    mem_free(row);
}

/* Writes n tensors, in the order of the list, without gaps. The file is in place when the call
 * returns; the same tensors give the same bytes. */
static void ckpt_write(rlhf_ctx *ctx, const char *path, const ckpt_tensor *t, int n) {
    json_t *header = json_hold(ctx, json_object());
    json_object_set_new(header, "__metadata__", json_pack("{s:s}", "format", "pt"));
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        const char *dtype = t[i].kind == '4' ? "F32" : t[i].kind == 'h' ? "F16" : "BF16";
        size_t a, b;
        ckpt_shape(t + i, &a, &b);
        size_t bytes = a * b * ckpt_dtype_size(dtype);
        json_t *shape = t[i].cols ? json_pack("[I,I]", (json_int_t)a, (json_int_t)b)
                                  : json_pack("[I]", (json_int_t)a);
        json_object_set_new(header, t[i].name,
                            json_pack("{s:s,s:o,s:[I,I]}", "dtype", dtype, "shape", shape,
                                      "data_offsets", (json_int_t)at, (json_int_t)(at + bytes)));
        at += bytes;
    }
    /* The header is padded with spaces to 8 bytes, so that the data are aligned in a mapping. */
    size_t len;
    char *text = json_text(ctx, header, JSON_COMPACT, &len);
    size_t padded = base_round_up(len, 8);
    unsigned char size[8];
    for (int i = 0; i < 8; i++) size[i] = (unsigned char)(padded >> 8 * i);
    io_file *f = io_create(ctx, path);
    io_write(f, size, 8);
    io_write(f, text, len);
    io_write(f, "       ", padded - len);
    for (int i = 0; i < n; i++) ckpt_put(f, ctx, t + i);
    io_commit(f);
    mem_free(text);
    err_release(ctx);
}

/* ---- models ---- */

/* The full name of a tensor in a file into out[size], with or without the family's prefix. */
static const char *ckpt_name(char *out, size_t size, const model_family *f, const model_tensor *t,
                             int layer, int prefix) {
    const char *p = t->name, *mark = strstr(p, "%d");
    int bare = *p == '!';
    p += bare;
    const char *pre = bare || !prefix ? "" : f->prefix;
    if (mark) snprintf(out, size, "%s%.*s%d%s", pre, (int)(mark - p), p, layer, mark + 2);
    else snprintf(out, size, "%s%s", pre, p);
    return out;
}

/* Gives a tensor its data: the rows of the model's array, or what its base has in a file. */
static void ckpt_fill(const rlhf_model *m, const model_tensor *t, int layer, ckpt_tensor *o) {
    float *w = model_w(m, t->param, layer);
    int from;
    model_part_rows(&m->c, t->part, m->slot[t->param].rows, &from);
    if (w) {
        o->data = w + (size_t)from * (size_t)m->slot[t->param].cols;
        return;
    }
    o->raw = m->base->piece[model_index(t->param, layer)][model_part_piece(t->part)];
    /* What could not be mapped is floats in the model's order. */
    if (o->raw.transposed != t->transposed || (o->raw.hd != 0) != (o->hd != 0))
        o->data = (float *)(uintptr_t)(const void *)o->raw.data;
    if (o->raw.transposed) {
        int rows = o->raw.rows;
        o->raw.rows = o->raw.cols, o->raw.cols = rows;
    }
    o->raw.transposed = o->raw.hd = 0;
}

/* The tensor t of one layer as it stands in a file, with the model's data. */
static ckpt_tensor ckpt_tensor_of(const rlhf_model *m, const model_tensor *t, int layer,
                                  int prefix) {
    const model_slot *s = m->slot + t->param;
    int from;
    ckpt_tensor o = {.rows = (size_t)model_part_rows(&m->c, t->part, s->rows, &from),
                     .cols = s->cols == 1 ? 0 : (size_t)s->cols,
                     .transposed = t->transposed};
    if (t->part == PART_HEADS) o.hd = (size_t)m->c.hd;
    ckpt_name(o.name, sizeof o.name, m->family, t, layer, prefix);
    ckpt_fill(m, t, layer, &o);
    return o;
}

/* What the file said of its dtype. */
static char *ckpt_stored(const rlhf_model *m, const model_tensor *t, int layer) {
    return m->stored + (t - m->family->tensors) * m->c.layers + layer;
}

/* Whether a tensor that no parameter asked for may be there: buffers that old versions of
 * transformers saved, a copy of the embedding, and what another head has. */
static int ckpt_ignored(const rlhf_model *m, const char *name) {
    static const char *const tails[] = {".attn.bias", ".attn.masked_bias", ".attention.bias",
                                        ".attention.masked_bias", ".rotary_emb.inv_freq"};
    for (size_t i = 0; i < sizeof tails / sizeof *tails; i++) {
        size_t n = strlen(name), k = strlen(tails[i]);
        if (n >= k && !strcmp(name + n - k, tails[i])) return 1;
    }
    /* The family's names of heads; where one is a parameter of this model, it is not left over. */
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        if ((t->param == P_HEAD || t->param == P_SCORE) && !strcmp(name, t->name + 1)) return 1;
    return 0;
}

/* A block of the base, or of a model that has none. */
static float *ckpt_block(rlhf_model *m, size_t n) {
    float *w = mem_zalloc(m->ctx, n, sizeof *w);
    m->base->blocks[m->base->n_blocks++] = w;
    return w;
}

/* Takes a tensor from a file: into the model's array, into floats of its base, or as what the base
 * is. What is not aligned for its dtype is copied. */
static void ckpt_take(rlhf_model *m, const model_tensor *t, int layer, op_piece *piece) {
    const model_slot *s = m->slot + t->param;
    size_t i = model_index(t->param, layer), cols = (size_t)s->cols;
    int from, rows = model_part_rows(&m->c, t->part, s->rows, &from);
    if (s->where == MODEL_FILE) {
        if (!ckpt_aligned(piece)) {
            float *w = ckpt_block(m, (size_t)rows * cols);
            ckpt_copy(m->ctx, piece, w);
            *piece = (op_piece){.data = (unsigned char *)w, .rows = rows, .cols = s->cols,
                                .kind = '4'};
        }
        m->base->piece[i][model_part_piece(t->part)] = *piece;
        m->base->pieces[i]++;
        return;
    }
    /* A score head is a model's own, but other models of the same files start with it, too. */
    int floats = s->where == MODEL_FLOATS || (m->base && t->param == P_SCORE);
    if (floats && !m->base->floats[i]) m->base->floats[i] = ckpt_block(m, s->n);
    if (floats) ckpt_copy(m->ctx, piece, m->base->floats[i] + (size_t)from * cols);
    if (s->where == MODEL_FLOATS) return;
    ckpt_copy(m->ctx, piece, model_w(m, t->param, layer) + (size_t)from * cols);
}

/* Loads what one file of dir holds of the model. seen, by name of tensor: the file that has it. A
 * tensor of no parameter stays in `rest` with its file. */
static void ckpt_load_file(rlhf_model *m, const char *dir, const char *file, json_t *seen,
                           json_t *rest) {
    const char *path = ckpt_path(m->ctx, dir, file);
    ckpt_file f = ckpt_map(m->ctx, path);
    json_t *left = json_hold(m->ctx, json_copy((json_t *)(uintptr_t)f.header)), *entry;
    const char *name;
    json_object_del(left, "__metadata__");
    json_object_foreach(left, name, entry) {
        json_t *other = json_object_get(seen, name);
        if (other)
            err_throw(m->ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\" is in %s too", path, name,
                      json_string_value(other));
        json_object_set_new(seen, name, json_string(file));
    }
    /* Every tensor of the family that this model has; GPT-2's files may lack the prefix. */
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        for (int l = 0; l < model_param_layers(m, t->param); l++)
            for (int prefix = 1; prefix >= !m->family->prefix_optional; prefix--) {
                ckpt_tensor x = ckpt_tensor_of(m, t, l, prefix);
                if (!(entry = json_object_get(left, x.name))) continue;
                op_piece piece = ckpt_find(&f, entry, &x);
                *ckpt_stored(m, t, l) = piece.kind;
                ckpt_take(m, t, l, &piece);
                if (t->param == P_SCORE) m->score_trained = 1;
                json_object_del(left, x.name);
                break;
            }
    json_object_foreach(left, name, entry) {
        if (!ckpt_ignored(m, name)) json_object_set_new(rest, name, json_string(path));
        else if (m->base) m->base->other_score |= !strcmp(name, "score.weight");
    }
    err_release(m->ctx);
    err_release(m->ctx);
    /* A base keeps the mapping. */
    if (m->base) {
        m->base->maps = mem_realloc(m->ctx, m->base->maps,
                                    (size_t)(m->base->n_maps + 1) * sizeof *m->base->maps);
        m->base->maps[m->base->n_maps++] = m->ctx->defer[m->ctx->n_defer - 1].ptr;
        err_keep(m->ctx);
    } else {
        err_release(m->ctx);
    }
}

/* Loads all files of an index: {"weight_map": {tensor: file}}. Whatever the order of the map, a
 * file is opened once; each tensor has to be in the file that the map says. */
static void ckpt_load_shards(rlhf_model *m, const char *dir, const char *index, json_t *seen,
                             json_t *rest) {
    json_src src = json_source(m->ctx, index);
    json_t *map = json_need_object(&src, json_read(&src), "weight_map"), *file;
    json_t *files = json_hold(m->ctx, json_object());
    const char *name;
    src.at = "weight_map.";
    json_object_foreach(map, name, file) {
        if (!json_is_string(file)) json_bad(&src, name, file, "the name of a file");
        if (!json_object_get(files, json_string_value(file)))
            json_object_set_new(files, json_string_value(file), json_string(name));
    }
    const char *shard;
    json_object_foreach(files, shard, file) {
        char *path = ckpt_path(m->ctx, dir, shard);
        if (!io_exists(path))
            err_throw(m->ctx, RLHF_ERR_IO,
                      "%s: missing, though %s has tensor \"%s\" there; copy all of the files", path,
                      index, json_string_value(file));
        ckpt_load_file(m, dir, shard, seen, rest);
    }
    json_object_foreach(map, name, file) {
        const char *in = json_string_value(json_object_get(seen, name));
        if (!in || strcmp(in, json_string_value(file)))
            err_throw(m->ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\" is in %s, not in %s", index, name,
                      in ? in : "no file", json_string_value(file));
    }
    err_release(m->ctx);
    err_release(m->ctx);
}

/* Throws: no weights that are read. What stands there instead tells what to do. */
static void ckpt_no_weights(rlhf_ctx *ctx, const char *dir) {
    static const char *const pickles[] = {"pytorch_model.bin", "pytorch_model.bin.index.json"};
    for (size_t i = 0; i < sizeof pickles / sizeof *pickles; i++)
        if (io_exists(ckpt_path(ctx, dir, pickles[i])))
            err_throw(ctx, RLHF_ERR_UNSUPPORTED,
                      "%s: holds %s, a Python pickle; convert it once from Python: from "
                      "transformers import AutoModelForCausalLM as M; "
                      "M.from_pretrained(dir, dtype=\"auto\").save_pretrained(dir, "
                      "safe_serialization=True)",
                      dir, pickles[i]);
    err_throw(ctx, RLHF_ERR_IO, "%s: no model.safetensors, no model.safetensors.index.json", dir);
}

/* The file that holds dir's weights, or says which do; null if there is none. */
static const char *ckpt_weights_file(rlhf_ctx *ctx, const char *dir) {
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (io_exists(ckpt_path(ctx, dir, names[i]))) return names[i];
    return NULL;
}

/* The first tensor that the model needs and that no file had, its name into out; null if all are
 * there. */
static const char *ckpt_missing(const rlhf_model *m, char *out, size_t size) {
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        for (int l = 0; l < model_param_layers(m, t->param) && t->param != P_SCORE; l++)
            if (!*ckpt_stored(m, t, l)) return ckpt_name(out, size, m->family, t, l, 1);
    return NULL;
}

/* Fills m's weights from a directory of its family; m keeps its shape. A failed call leaves weights
 * partly replaced: the model is then to be closed or loaded again. */
static void ckpt_load_model(rlhf_model *m, const char *dir) {
    const char *file = ckpt_weights_file(m->ctx, dir);
    if (!file) ckpt_no_weights(m->ctx, dir);
    char *path = ckpt_path(m->ctx, dir, file);
    json_t *seen = json_hold(m->ctx, json_object()), *rest = json_hold(m->ctx, json_object());
    m->version++; /* panels of the old weights are stale from the first tensor on */
    m->score_trained = 0;
    memset(m->stored, 0, model_tensors(m) * (size_t)m->c.layers);
    if (strstr(file, ".json")) ckpt_load_shards(m, dir, path, seen, rest);
    else ckpt_load_file(m, dir, file, seen, rest);
    char missing[160];
    if (ckpt_missing(m, missing, sizeof missing))
        err_throw(m->ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\" is missing", path, missing);
    /* What is left over was not expected. */
    const char *name;
    json_t *in;
    json_object_foreach(rest, name, in) {
        err_throw(m->ctx, RLHF_ERR_FORMAT, "%s: unexpected tensor \"%s\" for model_type %s",
                  json_string_value(in), name, m->family->type);
    }
    err_release(m->ctx);
    err_release(m->ctx);
    m->version++;
}

/* For err_defer: jansson's memory, mappings and settled blocks are not the context's, an unfinished
 * model's would leak. */
static void ckpt_drop_model(void *model) {
    rlhf_model *m = model;
    json_decref(m->config);
    model_base_drop(m->base);
    mem_free(m->w);
}

/* A model without weights from a parsed and held config, deferred (ckpt_drop_model); the hold stays
 * the caller's, the model takes a reference of its own. "mean" and "std" are the normalisation of a
 * reward model's scores. */
static rlhf_model *ckpt_describe(rlhf_ctx *ctx, const json_src *src, json_t *config) {
    rlhf_model *m = model_new(ctx, src, config);
    m->score_mean = (float)json_opt_real(src, config, "mean", 0);
    m->score_std = (float)json_opt_real(src, config, "std", 1);
    m->config = json_incref(config);
    err_defer(ctx, ckpt_drop_model, m);
    return m;
}

/* Gives such a model the weights of a base. */
static void ckpt_share(rlhf_model *m, model_base *base) {
    base->refs++;
    model_place(m, base);
    memcpy(m->stored, base->stored, model_tensors(m) * (size_t)m->c.layers);
    const float *score = base->floats[P_SCORE];
    m->score_trained = score && m->slot[P_SCORE].n;
    if (m->score_trained) memcpy(model_w(m, P_SCORE, 0), score, m->slot[P_SCORE].n * sizeof *score);
}

/* The same with zero weights of its own, or those of a base. */
static rlhf_model *ckpt_adopt(rlhf_ctx *ctx, const json_src *src, json_t *config,
                              model_base *base) {
    rlhf_model *m = ckpt_describe(ctx, src, config);
    if (base) ckpt_share(m, base);
    else model_place(m, NULL);
    return m;
}

/* What makes two openings the same files: device, number, size and time of every file of weights
 * in the directory, whatever their order. */
static uint64_t ckpt_identity(rlhf_ctx *ctx, const char *dir) {
    if (!ckpt_weights_file(ctx, dir)) ckpt_no_weights(ctx, dir);
    uint64_t all = 0;
    DIR *list = opendir(dir);
    if (!list) io_fail(ctx, "read", dir, errno);
    for (const struct dirent *e; (e = readdir(list));) {
        struct stat st;
        if (!strstr(e->d_name, ".safetensors") || fstatat(dirfd(list), e->d_name, &st, 0)) continue;
        uint64_t h = rng_mix((uint64_t)st.st_dev) + (uint64_t)st.st_ino;
        h = rng_mix(rng_mix(h) + (uint64_t)st.st_size) + (uint64_t)st.st_mtime;
        all += rng_mix(h);
    }
    closedir(list);
    return all;
}

/* Panels of a base are kept where they take no more than this: for the speed of decoding they take
 * the place of what the files hold, which may be half as large. */
enum { CKPT_KEEP_FLOATS = 1 << 28 };

/* Whether a base has what a model reads: config.json may be another than that of the model that it
 * was opened for, or ask for a head that was left in the files. */
static int ckpt_base_fits(rlhf_model *m, const model_base *b) {
    model_layout(m);
    if (m->c.layers != b->layers || m->c.hd != b->hd || m->family->tensors != b->tensors) return 0;
    for (int p = 0; p < P_COUNT; p++) {
        const model_slot *s = m->slot + p, *t = b->slot + p;
        int head = p == P_HEAD || p == P_SCORE;
        if (head ? s->n && !t->n && (p == P_HEAD || b->other_score)
                 : s->n != t->n || s->rows != t->rows || s->cols != t->cols)
            return 0;
    }
    return 1;
}

/* The model that config describes with the weights of a directory, deferred: on the base of another
 * model that was opened from the same files, or on a new one. */
static rlhf_model *ckpt_open_base(rlhf_ctx *ctx, const char *dir, const json_src *src,
                                  json_t *config) {
    uint64_t files = ckpt_identity(ctx, dir);
    rlhf_model *m = ckpt_describe(ctx, src, config);
    for (model_base *b = ctx->bases; b; b = b->next)
        if (b->files == files && ckpt_base_fits(m, b)) {
            ckpt_share(m, b);
            return m;
        }
    model_base *b = model_base_new(ctx, dir, m->c.layers, model_tensors(m));
    b->files = files;
    b->refs = 1;
    model_place(m, b);
    ckpt_load_model(m, dir);
    memcpy(b->slot, m->slot, sizeof b->slot);
    b->layers = m->c.layers, b->hd = m->c.hd, b->tensors = m->family->tensors;
    memcpy(b->stored, m->stored, model_tensors(m) * (size_t)m->c.layers);
    size_t floats = 0;
    for (int p = 0; p < P_COUNT; p++)
        if (m->slot[p].where == MODEL_FILE)
            floats += m->slot[p].n * (size_t)model_param_layers(m, p);
    b->keep_packed = floats <= CKPT_KEEP_FLOATS;
    b->next = ctx->bases;
    ctx->bases = b;
    return m;
}

/* Models tuned for chat name further end tokens in generation_config.json. */
static void ckpt_read_generation(rlhf_model *m, const char *dir) {
    char *path = ckpt_path(m->ctx, dir, "generation_config.json");
    if (!io_exists(path)) return;
    json_src src = json_source(m->ctx, path);
    model_read_special(m, &src, json_read(&src));
    err_release(m->ctx);
}

/* null, one id or a list, as transformers writes them. */
static json_t *ckpt_eos_json(const rlhf_model *m) {
    if (m->n_eos == 0) return json_null();
    if (m->n_eos == 1) return json_integer(m->eos[0]);
    json_t *list = json_array();
    for (int i = 0; i < m->n_eos; i++) json_array_append_new(list, json_integer(m->eos[i]));
    return list;
}

/* Transformers reads a score at the last token that is not padding. A padding token that also ends
 * answers would move it one token back, so another takes its place, or none. */
static void ckpt_set_pad(const rlhf_model *m, json_t *config) {
    const json_t *pad = json_get(config, "pad_token_id");
    if (json_is_integer(pad) && !model_is_eos(m, (int32_t)json_integer_value(pad))) return;
    int other = m->bos >= 0 && !model_is_eos(m, m->bos);
    json_object_set_new(config, "pad_token_id", other ? json_integer(m->bos) : json_null());
}

/* config.json as it is written: what was read, and what this library knows better. Unknown keys
 * survive, so that transformers sees its own file again. Held. */
static json_t *ckpt_config(const rlhf_model *m) {
    json_t *j = json_hold(m->ctx, json_deep_copy(m->config));
    int score = m->c.head == RLHF_HEAD_SCORE;
    /* What a clone or rlhf_model_init may have changed. */
    json_object_set_new(j, "architectures",
                        json_pack("[s]", score ? m->family->score_class : m->family->lm_class));
    json_object_set_new(j, "vocab_size", json_integer(m->c.vocab));
    json_object_set_new(j, "eos_token_id", ckpt_eos_json(m));
    json_object_set_new(j, "bos_token_id", m->bos < 0 ? json_null() : json_integer(m->bos));
    json_object_set_new(j, "tie_word_embeddings", json_boolean(m->c.tied));
    /* Either spelling may have been read; ckpt_save knows better. */
    json_object_del(j, "dtype");
    json_object_set_new(j, "torch_dtype", json_string("float32"));
    if (score) {
        json_object_set_new(j, "id2label", json_pack("{s:s}", "0", "LABEL_0"));
        json_object_set_new(j, "label2id", json_pack("{s:i}", "LABEL_0", 0));
        ckpt_set_pad(m, j);
        json_object_set_new(j, "mean", json_real((double)m->score_mean));
        json_object_set_new(j, "std", json_real((double)m->score_std));
    }
    return j;
}

/* The dtype to write a tensor in: that of the file it came from if no digit is lost, so that what
 * nobody changed is the same bytes again; else `kind`. */
static char ckpt_kind(const ckpt_tensor *t, char stored, char kind) {
    if (!stored || stored == '4') return kind;
    size_t n = t->rows * (t->cols ? t->cols : 1);
    return !t->data || ckpt_fits(t->data, n, stored) ? stored : kind;
}

/* generation_config.json of a language model. */
static void ckpt_save_generation(const rlhf_model *m, const char *dir) {
    json_t *g = json_hold(m->ctx, json_object());
    json_object_set_new(g, "eos_token_id", ckpt_eos_json(m));
    if (m->bos >= 0) json_object_set_new(g, "bos_token_id", json_integer(m->bos));
    json_write_file(m->ctx, ckpt_path(m->ctx, dir, "generation_config.json"), g);
    err_release(m->ctx);
}

/* Writes a model directory that transformers and ckpt_open read: weights first, so that config.json
 * appears in a new directory only when there is something to load. kind ('4' or 'b') is the dtype
 * of what is new or was trained. */
static void ckpt_save_model(const rlhf_model *m, const char *dir, char kind) {
    rlhf_ctx *ctx = m->ctx;
    int n = 0, cap = 0, same = 1;
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        cap += model_param_layers(m, t->param);
    ckpt_tensor *list = mem_zalloc(ctx, (size_t)cap + 1, sizeof *list);
    /* An untrained score head is not written, and counts as untrained when the directory is
     * opened. */
    for (const model_tensor *t = m->family->tensors; t->name; t++) {
        if (t->param == P_SCORE && !m->score_trained) continue;
        for (int l = 0; l < model_param_layers(m, t->param); l++, n++) {
            list[n] = ckpt_tensor_of(m, t, l, 1);
            list[n].kind = ckpt_kind(list + n, *ckpt_stored(m, t, l), kind);
            same &= list[n].kind == list[0].kind;
        }
    }
    ckpt_write(ctx, ckpt_path(ctx, dir, "model.safetensors"), list, n);
    json_t *config = ckpt_config(m);
    if (same && list[0].kind != '4')
        json_object_set_new(config, "torch_dtype",
                            json_string(list[0].kind == 'h' ? "float16" : "bfloat16"));
    json_write_file(ctx, ckpt_path(ctx, dir, "config.json"), config);
    err_release(ctx);
    if (m->c.head == RLHF_HEAD_LM) ckpt_save_generation(m, dir);
    mem_free(list);
}

/* A copy with the head asked for, as a new model of the same context, deferred (ckpt_drop_model).
 * It shares a base and copies what is the model's own; a head that the original lacks is zeros and
 * counts as untrained. */
static rlhf_model *ckpt_copy_model(rlhf_model *m, rlhf_head head) {
    json_t *config = ckpt_config(m);
    json_object_set_new(
        config, "architectures",
        json_pack("[s]", head == RLHF_HEAD_SCORE ? m->family->score_class : m->family->lm_class));
    /* The head is what "architectures" says: the copy is read from such a config. */
    json_src src = json_source(m->ctx, "config.json");
    if (head == RLHF_HEAD_LM && m->c.head == RLHF_HEAD_SCORE && !m->c.tied)
        err_throw(m->ctx, RLHF_ERR_ARG,
                  "a scorer has no output matrix to make a language model from");
    rlhf_model *o = ckpt_adopt(m->ctx, &src, config, m->base);
    if (m->c.lora.r) { /* the same adapters, not new ones */
        mem_free(o->w);
        o->w = NULL; /* an error below frees what o has */
        o->c.lora = m->c.lora;
        model_place(o, m->base);
    }
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_own_layers(o, p); l++)
            if (model_w(m, p, l))
                memcpy(model_w(o, p, l), model_w(m, p, l), o->slot[p].n * sizeof(float));
    memcpy(o->stored, m->stored, model_tensors(m) * (size_t)m->c.layers);
    o->score_trained = head == RLHF_HEAD_SCORE && m->score_trained;
    o->score_mean = o->score_trained ? m->score_mean : 0;
    o->score_std = o->score_trained ? m->score_std : 1;
    o->version++;
    return o;
}

/* A score head of zeros without a trunk of its own, for the states of m; deferred as a copy is. */
static rlhf_model *ckpt_head_for(rlhf_model *m) {
    json_t *config = ckpt_config(m);
    json_object_set_new(config, "architectures", json_pack("[s]", m->family->score_class));
    json_src src = json_source(m->ctx, "config.json");
    rlhf_model *o = ckpt_describe(m->ctx, &src, config);
    o->c.layers = 0;
    o->score_mean = 0;
    o->score_std = 1;
    o->score_trained = 1;
    model_place(o, NULL);
    return o;
}

/* A copy as the caller's. */
static rlhf_model *ckpt_clone(rlhf_model *m, rlhf_head head) {
    rlhf_model *o = ckpt_copy_model(m, head);
    err_keep(m->ctx);    /* the copy */
    err_release(m->ctx); /* its config */
    return o;
}

/* ============================================================================================
 * MARK: - 20 ADAPT (ckpt_)
 * Adapters in the layout of PEFT: adapter_config.json, which names the matrices and the directory
 * of the base, and adapter_model.safetensors. With them, what a directory is: a model of 19, or an
 * adapter on one.
 *
 * Entry: ckpt_open, ckpt_restore, ckpt_save; ckpt_targets.   Tests: test/test_lora.c
 * ============================================================================================ */

/* The name of the matrix that a tensor of the family is, as in target_modules, into out: the last
 * part of its path. */
static const char *ckpt_module(const model_tensor *t, char *out, size_t size) {
    const char *end = strstr(t->name, ".weight"), *p = end;
    while (p > t->name && p[-1] != '.') p--;
    snprintf(out, size, "%.*s", (int)(end - p), p);
    return out;
}

/* Turns on the matrices that `name` means: one of the family's, its path's end, or "all-linear".
 * PEFT may name the matrix of each layer; of which layers is seen by the tensors there are. Throws
 * if there is none. */
static void ckpt_target(const rlhf_model *m, const char *where, const char *name, model_lora *l) {
    char known[512] = "", module[64], path[160], end[160];
    int all = !strcmp(name, "all-linear"), found = 0;
    size_t digit = strcspn(name, "0123456789"), digits = strspn(name + digit, "0123456789");
    const char *rest = name + digit + digits;
    if (digits && *rest == '.' && (!digit || name[digit - 1] == '.'))
        snprintf(end, sizeof end, "%.*s%%d%s", (int)digit, name, rest);
    else snprintf(end, sizeof end, "%s", name);
    size_t n = strlen(end);
    for (const model_tensor *t = m->family->tensors; t->name; t++) {
        int i = model_module_of(t);
        if (i < 0) continue;
        ckpt_module(t, module, sizeof module);
        size_t at = strlen(known);
        if (!strstr(known, module))
            snprintf(known + at, sizeof known - at, "%s%s", at ? ", " : "", module);
        snprintf(path, sizeof path, ".%s%.*s", m->family->prefix,
                 (int)(strstr(t->name, ".weight") - t->name), t->name);
        size_t k = strlen(path);
        if (!all && (k <= n || path[k - n - 1] != '.' || strcmp(path + k - n, end) != 0)) continue;
        l->on |= 1u << i;
        found = 1;
    }
    if (!found)
        err_throw(m->ctx, RLHF_ERR_ARG,
                  "%s: \"%s\" is no matrix of model_type %s that can have an adapter; there are "
                  "%s, or all-linear",
                  where, name, m->family->type, known);
}

/* Turns on what a comma-separated list says; "auto" is what PEFT chooses: query and value, or all
 * of attention's input where these are one matrix. */
static void ckpt_targets(const rlhf_model *m, const char *where, const char *list, model_lora *l) {
    if (!strcmp(list, "auto")) {
        l->on = 1u << LORA_Q | 1u << LORA_V;
        for (const model_tensor *t = m->family->tensors; t->name; t++)
            if (model_module_of(t) == LORA_QKV) l->on = 1u << LORA_QKV;
        return;
    }
    char name[64];
    for (const char *p = list; *p; p += *p == ',') {
        size_t n = strcspn(p, ",");
        snprintf(name, sizeof name, "%.*s", (int)n, p);
        ckpt_target(m, where, name, l);
        p += n;
    }
    if (!l->on)
        err_throw(m->ctx, RLHF_ERR_ARG, "%s: no matrix is named, so there is nothing to adapt",
                  where);
}

/* A member that asks for what is not computed here is refused, unless it has its neutral value. */
static void ckpt_adapter_need(const json_src *src, const json_t *j, const char *key, int neutral) {
    if (neutral) return;
    char *text = json_text(src->ctx, json_get(j, key), JSON_COMPACT | JSON_ENCODE_ANY, NULL);
    err_throw(src->ctx, RLHF_ERR_UNSUPPORTED,
              "%s: \"%s\" is %s, which this version does not compute; merge the adapter with PEFT "
              "(merge_and_unload) first",
              src->file, key, text);
}

/* adapter_config.json as a description of adapters to m. */
static model_lora ckpt_read_lora(const rlhf_model *m, const json_src *src, const json_t *j) {
    model_lora l = {.r = (int)json_opt_int(src, j, "r", 1, 65536, 8),
                    .alpha = (float)json_opt_real(src, j, "lora_alpha", 8),
                    .dropout = (float)json_opt_real(src, j, "lora_dropout", 0),
                    .rslora = json_opt_bool(src, j, "use_rslora", 0)};
    const json_t *targets = json_get(j, "target_modules"), *t;
    const json_t *save = json_get(j, "modules_to_save");
    size_t i;
    ckpt_adapter_need(src, j, "peft_type", !strcmp(json_need_str(src, j, "peft_type"), "LORA"));
    ckpt_adapter_need(src, j, "use_dora", !json_opt_bool(src, j, "use_dora", 0));
    ckpt_adapter_need(src, j, "bias", !strcmp(json_opt_str(src, j, "bias", "none"), "none"));
    ckpt_adapter_need(src, j, "rank_pattern", !json_object_size(json_get(j, "rank_pattern")));
    ckpt_adapter_need(src, j, "alpha_pattern", !json_object_size(json_get(j, "alpha_pattern")));
    ckpt_adapter_need(src, j, "layers_to_transform", !json_get(j, "layers_to_transform"));
    json_array_foreach(save, i, t) {
        const char *name = json_string_value(t);
        ckpt_adapter_need(src, j, "modules_to_save",
                          name && m->c.head == RLHF_HEAD_SCORE &&
                              base_is_choice("score|classifier", name));
    }
    if (json_is_string(targets)) ckpt_target(m, src->file, json_string_value(targets), &l);
    json_array_foreach(targets, i, t) {
        if (!json_is_string(t)) json_bad(src, "target_modules", t, "names of matrices");
        ckpt_target(m, src->file, json_string_value(t), &l);
    }
    if (!l.on) json_bad(src, "target_modules", targets, "a list of names");
    return l;
}

/* Every tensor of the model's adapters, and its score head, as PEFT's file has them: a block;
 * *n becomes their number. */
static ckpt_tensor *ckpt_adapter_tensors(const rlhf_model *m, int *n) {
    static const char outer[] = "base_model.model.";
    ckpt_tensor *list =
        mem_zalloc(m->ctx, 2 * LORA_MODULES * (size_t)m->c.layers + 1, sizeof *list);
    char name[160];
    *n = 0;
    for (const model_tensor *t = m->family->tensors; t->name; t++) {
        int i = model_module_of(t), on = i >= 0 && (m->c.lora.on >> i & 1);
        for (int l = 0; on && l < m->c.layers; l++)
            for (int half = 0; half < 2; half++) {
                int p = half ? model_modules[i].b : model_modules[i].a;
                ckpt_tensor *o = list + (*n)++;
                ckpt_name(name, sizeof name, m->family, t, l, 1);
                *strstr(name, ".weight") = 0;
                snprintf(o->name, sizeof o->name, "%s%.110s.lora_%c.weight", outer, name,
                         half ? 'B' : 'A');
                o->rows = (size_t)m->slot[p].rows, o->cols = (size_t)m->slot[p].cols;
                if (half && t->part == PART_HEADS) o->hd = (size_t)m->c.hd;
                o->data = model_w(m, p, l);
                o->kind = '4';
            }
        if (t->param != P_SCORE || !m->slot[P_SCORE].n || !m->score_trained) continue;
        ckpt_tensor *o = list + (*n)++;
        *o = ckpt_tensor_of(m, t, 0, 1);
        o->data = model_w(m, P_SCORE, 0);
        o->kind = '4';
        memmove(o->name + sizeof outer - 1, o->name, strlen(o->name) + 1);
        memcpy(o->name, outer, sizeof outer - 1);
    }
    return list;
}

/* The matrices that have adapters, by name, without repetition. */
static json_t *ckpt_target_names(const rlhf_model *m) {
    json_t *names = json_array();
    char module[64];
    for (const model_tensor *t = m->family->tensors; t->name; t++) {
        int i = model_module_of(t), known = 0;
        if (i < 0 || !(m->c.lora.on >> i & 1)) continue;
        /* GPT-2 has two matrices of one name, told apart by their path. */
        ckpt_module(t, module, sizeof module);
        for (const model_tensor *o = m->family->tensors; o->name; o++) {
            char other[64];
            int k = model_module_of(o);
            if (k >= 0 && k != i && !strcmp(ckpt_module(o, other, sizeof other), module))
                known = 1;
        }
        const char *mark = strstr(t->name, "%d.");
        json_array_append_new(
            names, known ? json_stringn(mark + 3, (size_t)(strstr(mark, ".weight") - mark - 3))
                         : json_string(module));
    }
    return names;
}

/* Writes adapters as PEFT does: the weights, then adapter_config.json, and for a reward model
 * reward.json with the normalisation of its scores. */
static void ckpt_save_adapter(const rlhf_model *m, const char *dir) {
    rlhf_ctx *ctx = m->ctx;
    const model_lora *l = &m->c.lora;
    int n, score = m->c.head == RLHF_HEAD_SCORE;
    ckpt_tensor *list = ckpt_adapter_tensors(m, &n);
    ckpt_write(ctx, ckpt_path(ctx, dir, "adapter_model.safetensors"), list, n);
    mem_free(list);
    if (score) {
        json_t *reward = json_hold(ctx, json_object());
        json_object_set_new(reward, "mean", json_real((double)m->score_mean));
        json_object_set_new(reward, "std", json_real((double)m->score_std));
        json_write_file(ctx, ckpt_path(ctx, dir, "reward.json"), reward);
        err_release(ctx);
    } else {
        ckpt_save_generation(m, dir);
    }
    json_t *j = json_hold(ctx, json_object());
    json_object_set_new(j, "peft_type", json_string("LORA"));
    json_object_set_new(j, "task_type", json_string(score ? "SEQ_CLS" : "CAUSAL_LM"));
    json_object_set_new(j, "base_model_name_or_path", json_string(m->base->dir));
    json_object_set_new(j, "r", json_integer(l->r));
    json_object_set_new(j, "lora_alpha", json_real((double)l->alpha));
    json_object_set_new(j, "lora_dropout", json_real((double)l->dropout));
    json_object_set_new(j, "use_rslora", json_boolean(l->rslora));
    json_object_set_new(j, "target_modules", ckpt_target_names(m));
    json_object_set_new(j, "modules_to_save", score ? json_pack("[s]", "score") : json_null());
    json_object_set_new(j, "fan_in_fan_out",
                        json_boolean(m->family->tensors == model_gpt2_tensors));
    json_object_set_new(j, "bias", json_string("none"));
    json_object_set_new(j, "init_lora_weights", json_true());
    json_object_set_new(j, "inference_mode", json_true());
    json_write_file(ctx, ckpt_path(ctx, dir, "adapter_config.json"), j);
    err_release(ctx);
}

/* Fills the adapters and the score head of a model from a directory that has the same. */
static void ckpt_load_adapter(rlhf_model *m, const char *dir) {
    rlhf_ctx *ctx = m->ctx;
    ckpt_file f = ckpt_map(ctx, ckpt_path(ctx, dir, "adapter_model.safetensors"));
    json_t *left = json_hold(ctx, json_copy((json_t *)(uintptr_t)f.header)), *entry;
    const char *name;
    int n;
    json_object_del(left, "__metadata__");
    m->version++;
    m->score_trained = m->slot[P_SCORE].n != 0; /* so that the list has it */
    ckpt_tensor *list = ckpt_adapter_tensors(m, &n);
    for (int i = 0; i < n; i++) {
        int score = list[i].data == model_w(m, P_SCORE, 0);
        if (!(entry = json_object_get(left, list[i].name)) && score) m->score_trained = 0;
        else if (!entry)
            err_throw(ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\" is missing", f.src.file,
                      list[i].name);
        if (entry) ckpt_load(&f, entry, list + i);
        json_object_del(left, list[i].name);
    }
    json_object_foreach(left, name, entry) {
        err_throw(ctx, RLHF_ERR_FORMAT,
                  "%s: unexpected tensor \"%s\": adapter_config.json does not speak of it",
                  f.src.file, name);
    }
    mem_free(list);
    for (int i = 0; i < 3; i++) err_release(ctx);
    char *path = ckpt_path(ctx, dir, "reward.json");
    if (m->score_trained && io_exists(path)) {
        json_src src = json_source(ctx, path);
        json_t *j = json_read(&src);
        m->score_mean = (float)json_need_real(&src, j, "mean");
        m->score_std = (float)json_need_real(&src, j, "std");
        err_release(ctx);
    }
    m->version++;
}

/* The directory of an adapter's base: as adapter_config.json names it, else seen from the
 * adapter. */
static char *ckpt_base_dir(const json_src *src, const json_t *j, const char *dir) {
    const char *name = json_need_str(src, j, "base_model_name_or_path");
    char *beside = ckpt_path(src->ctx, dir, name);
    if (io_is_dir(name)) return mem_temp(mem_strdup(src->ctx, name));
    if (*name != '/' && io_is_dir(beside)) return beside;
    err_throw(src->ctx, RLHF_ERR_IO,
              "%s: \"base_model_name_or_path\" is \"%s\", which is no directory here; put the base "
              "model there, or write its directory into this file",
              src->file, name);
}

/* ---- directories ---- */

/* Writes a model directory, or an adapter's where the model has adapters (ckpt_save_model). */
static void ckpt_save(const rlhf_model *m, const char *dir, char kind) {
    io_mkdirs(m->ctx, dir);
    if (m->c.lora.r) ckpt_save_adapter(m, dir);
    else ckpt_save_model(m, dir, kind);
}

/* Fills what is trained of a model from a directory that ckpt_save wrote of such a one. */
static void ckpt_restore(rlhf_model *m, const char *dir) {
    if (m->c.lora.r) ckpt_load_adapter(m, dir);
    else ckpt_load_model(m, dir);
}

/* Opens an adapter on its base: the base's configuration with the head that task_type says. */
static rlhf_model *ckpt_open_adapter(rlhf_ctx *ctx, const char *dir, const char *path) {
    json_src asrc = json_source(ctx, path);
    json_t *adapter = json_read(&asrc);
    char *base = ckpt_base_dir(&asrc, adapter, dir);
    const char *task = json_opt_str(&asrc, adapter, "task_type", "CAUSAL_LM");
    if (io_exists(ckpt_path(ctx, base, "adapter_config.json")))
        err_throw(ctx, RLHF_ERR_UNSUPPORTED,
                  "%s: its base %s is an adapter itself; merge that one first (rlhf export "
                  "--merge)",
                  path, base);
    json_src src = json_source(ctx, ckpt_path(ctx, base, "config.json"));
    json_t *config = json_read(&src);
    const model_family *family = model_find_family(&src, config);
    if (!base_is_choice("SEQ_CLS|CAUSAL_LM", task))
        json_bad(&asrc, "task_type", json_get(adapter, "task_type"), "CAUSAL_LM or SEQ_CLS");
    json_object_set_new(
        config, "architectures",
        json_pack("[s]", !strcmp(task, "SEQ_CLS") ? family->score_class : family->lm_class));
    rlhf_model *m = ckpt_open_base(ctx, base, &src, config);
    model_lora lora = ckpt_read_lora(m, &asrc, adapter);
    model_adapt(m, &lora, 0);
    ckpt_load_adapter(m, dir);
    ckpt_read_generation(m, base);
    ckpt_read_generation(m, dir);
    err_keep(ctx);
    err_release(ctx);
    err_release(ctx);
    return m;
}

/* Opens a directory: config.json, model.safetensors (or its index) and, if there,
 * generation_config.json; or an adapter. What is missing or stored in another way is an error that
 * says how to save it. */
static rlhf_model *ckpt_open(rlhf_ctx *ctx, const char *dir) {
    if (!io_is_dir(dir))
        err_throw(ctx, RLHF_ERR_IO, "%s: not a directory; expected a Hugging Face model directory",
                  dir);
    char *path = ckpt_path(ctx, dir, "adapter_config.json");
    if (io_exists(path)) return ckpt_open_adapter(ctx, dir, path);
    path = ckpt_path(ctx, dir, "config.json");
    json_src src = json_source(ctx, path);
    json_t *config = json_read(&src);
    rlhf_model *m = ckpt_open_base(ctx, dir, &src, config);
    ckpt_read_generation(m, dir);
    err_keep(ctx);
    err_release(ctx);
    return m;
}

/* ============================================================================================
 * MARK: - 21 GGUF (gguf_)
 * A language model and its tokenizer as one file that llama.cpp loads. A family is a row of
 * gguf_archs, a tensor's name a row of gguf_names. What llama.cpp would compute or cut in another
 * way is refused, or named in the log where it concerns few texts: an f32 file gives the greedy
 * tokens that section 24 gives.
 *
 * A GGUF file, version 3, is little-endian as the processors of 01: "GGUF", the version, how many
 * tensors and keys; the keys with typed values; each tensor's name, sizes (that of a row first),
 * type and place; then the tensors. All of them begin at multiples of 32 bytes.
 *
 * Entry: gguf_save.
 * Tests: test/test_export.c
 * ============================================================================================ */

/* Types of values. */
enum { GGUF_U32 = 4, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY };

/* What a token is. */
enum { GGUF_NORMAL = 1, GGUF_UNKNOWN, GGUF_CONTROL, GGUF_USER, GGUF_UNUSED, GGUF_BYTE };

enum { GGUF_VERSION = 3, GGUF_ALIGN = 32, GGUF_BLOCK = 32 };

#define GGUF_KINDS "f32|f16|bf16|q8_0"

/* How a tensor's numbers are stored. A block of q8_0 is a scale and 32 bytes. */
typedef struct gguf_kind {
    const char *name;
    uint32_t type, file_type;  /* in a tensor's entry, and of a file of mostly such tensors */
    size_t block, block_bytes; /* numbers, and bytes of so many */
} gguf_kind;

static const gguf_kind gguf_f32 = {"f32", 0, 0, 1, 4}, gguf_f16 = {"f16", 1, 1, 1, 2},
                       gguf_bf16 = {"bf16", 30, 32, 1, 2},
                       gguf_q8 = {"q8_0", 8, 7, GGUF_BLOCK, GGUF_BLOCK + 2};

/* What llama.cpp calls a family. llama: it rotates neighbours of a head, not its halves, so the
 * rows of queries and keys are sorted accordingly; it also knows slowed frequencies and heads whose
 * sizes do not add up to the width. */
static const struct {
    const char *family, *arch;
    int llama;
} gguf_archs[] = {
    {"gpt2", "gpt2", 0}, {"llama", "llama", 1}, {"mistral", "llama", 1}, {"qwen2", "qwen2", 0}};

/* Names of tensors, %d stands for the layer. */
static const struct {
    uint8_t param, part;
    const char *name;
} gguf_names[] = {{P_WTE, PART_ALL, "token_embd.weight"},
                  {P_WPE, PART_ALL, "position_embd.weight"},
                  {P_LN1_W, PART_ALL, "blk.%d.attn_norm.weight"},
                  {P_LN1_B, PART_ALL, "blk.%d.attn_norm.bias"},
                  {P_QKV_W, PART_ALL, "blk.%d.attn_qkv.weight"},
                  {P_QKV_B, PART_ALL, "blk.%d.attn_qkv.bias"},
                  {P_QKV_W, PART_Q, "blk.%d.attn_q.weight"},
                  {P_QKV_W, PART_K, "blk.%d.attn_k.weight"},
                  {P_QKV_W, PART_V, "blk.%d.attn_v.weight"},
                  {P_QKV_B, PART_Q, "blk.%d.attn_q.bias"},
                  {P_QKV_B, PART_K, "blk.%d.attn_k.bias"},
                  {P_QKV_B, PART_V, "blk.%d.attn_v.bias"},
                  {P_O_W, PART_ALL, "blk.%d.attn_output.weight"},
                  {P_O_B, PART_ALL, "blk.%d.attn_output.bias"},
                  {P_LN2_W, PART_ALL, "blk.%d.ffn_norm.weight"},
                  {P_LN2_B, PART_ALL, "blk.%d.ffn_norm.bias"},
                  {P_UP_W, PART_ALL, "blk.%d.ffn_up.weight"},
                  {P_UP_B, PART_ALL, "blk.%d.ffn_up.bias"},
                  {P_UP_W, PART_GATE, "blk.%d.ffn_gate.weight"},
                  {P_UP_W, PART_UP, "blk.%d.ffn_up.weight"},
                  {P_UP_B, PART_GATE, "blk.%d.ffn_gate.bias"},
                  {P_UP_B, PART_UP, "blk.%d.ffn_up.bias"},
                  {P_DOWN_W, PART_ALL, "blk.%d.ffn_down.weight"},
                  {P_DOWN_B, PART_ALL, "blk.%d.ffn_down.bias"},
                  {P_LNF_W, PART_ALL, "output_norm.weight"},
                  {P_LNF_B, PART_ALL, "output_norm.bias"},
                  {P_HEAD, PART_ALL, "output.weight"}};

/* Words as pre-tokenizers cut them, and what llama.cpp calls those. merges 0: words that are pieces
 * are taken whole (ignore_merges). */
#define GGUF_CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
#define GGUF_LETTERS "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define GGUF_REST "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define GGUF_UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define GGUF_LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
static const struct {
    const char *first, *second; /* patterns of one or two cuts */
    int merges;
    const char *name;
} gguf_pres[] = {{TOK_GPT2_PATTERN, NULL, 1, "gpt-2"},
                 {TOK_DIGIT_PATTERN, TOK_GPT2_PATTERN, 1, "smollm"},
                 {GGUF_CONTRACTIONS GGUF_LETTERS "\\p{N}" GGUF_REST, NULL, 1, "qwen2"},
                 {GGUF_CONTRACTIONS GGUF_LETTERS "\\p{N}{1,3}" GGUF_REST, NULL, 0, "llama-bpe"},
                 {GGUF_CONTRACTIONS GGUF_LETTERS "\\p{N}{1,3}" GGUF_REST, NULL, 1, "smaug-bpe"},
                 {"[^\\r\\n\\p{L}\\p{N}]?" GGUF_UPPER "*" GGUF_LOWER
                  "+|[^\\r\\n\\p{L}\\p{N}]?" GGUF_UPPER "+" GGUF_LOWER
                  "*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
                  NULL, 0, "tekken"}};

/* One tensor of the file: rows of a parameter, head dimension hd where they are to be sorted,
 * else 0. */
typedef struct gguf_tensor {
    char name[64];
    const gguf_kind *kind;
    const float *w;
    size_t rows, cols, hd;
    int one_dim;
} gguf_tensor;

/* The file before its tensors. */
typedef struct gguf_head {
    rlhf_ctx *ctx;
    const char *arch;
    tok_buf keys, infos;
    uint64_t n_keys, n_tensors, size; /* size: bytes of tensors so far */
} gguf_head;

/* ---- keys ---- */

/* Integers and texts as the file has them. */
static void gguf_u32(tok_buf *b, uint32_t v) { tok_put(b, (const char *)&v, sizeof v); }
static void gguf_u64(tok_buf *b, uint64_t v) { tok_put(b, (const char *)&v, sizeof v); }
static void gguf_text(tok_buf *b, const char *s, size_t n) {
    gguf_u64(b, n);
    tok_put(b, s, n);
}

/* "group.name" and the type of the value, which the caller appends. */
static tok_buf *gguf_key(gguf_head *h, const char *group, const char *name, uint32_t type) {
    char key[96];
    snprintf(key, sizeof key, "%s.%s", group, name);
    gguf_text(&h->keys, key, strlen(key));
    gguf_u32(&h->keys, type);
    h->n_keys++;
    return &h->keys;
}

/* The start of a list of n values of one type. */
static tok_buf *gguf_list(gguf_head *h, const char *name, uint32_t type, int n) {
    tok_buf *b = gguf_key(h, "tokenizer.ggml", name, GGUF_ARRAY);
    gguf_u32(b, type);
    gguf_u64(b, (uint64_t)n);
    return b;
}

/* Whole keys: sizes of the model, numbers, and what concerns the tokenizer. */
static void gguf_key_size(gguf_head *h, const char *name, int v) {
    gguf_u32(gguf_key(h, h->arch, name, GGUF_U32), (uint32_t)v);
}
static void gguf_key_real(gguf_head *h, const char *name, float v) {
    gguf_u32(gguf_key(h, h->arch, name, GGUF_F32), (uint32_t)v_int1(v));
}
static void gguf_key_id(gguf_head *h, const char *name, int id) {
    if (id >= 0) gguf_u32(gguf_key(h, "tokenizer.ggml", name, GGUF_U32), (uint32_t)id);
}
static void gguf_key_flag(gguf_head *h, const char *name, int v) {
    tok_put(gguf_key(h, "tokenizer.ggml", name, GGUF_BOOL), v ? "\1" : "\0", 1);
}
static void gguf_key_text(gguf_head *h, const char *group, const char *name, const char *s) {
    gguf_text(gguf_key(h, group, name, GGUF_STRING), s, strlen(s));
}

/* ---- tokenizer ---- */

/* The name of the pre-tokenizer that cuts words as a byte-level tokenizer does. llama.cpp does not
 * compose characters before that; nearly all text is composed. */
static const char *gguf_pre(const rlhf_tokenizer *t) {
    const char *cut[2] = {NULL, NULL};
    const int nfc = UTF8PROC_STABLE | UTF8PROC_COMPOSE;
    int n = 0, odd = 0, form = 0;
    for (int i = 0; i < (int)stbds_arrlen(t->steps); i++) {
        const tok_step *st = &t->steps[i];
        int isolated = st->mode == TOK_ISOLATED ? !st->flag : st->mode == TOK_REMOVED && st->flag;
        if (st->kind == TOK_SPLIT && isolated && n < 2) cut[n++] = st->text;
        else if (st->kind == TOK_UNICODE) form = st->mode;
        else odd |= st->kind != TOK_ADDED;
    }
    if (form == nfc)
        log_at(t->ctx, RLHF_LOG_INFO,
               "llama.cpp does not compose characters (NFC) as this tokenizer does: texts with "
               "decomposed ones get other tokens there");
    odd |= form && form != nfc;
    for (size_t i = 0; n && !odd && i < sizeof gguf_pres / sizeof *gguf_pres; i++) {
        const char *second = gguf_pres[i].second;
        if (!strcmp(cut[0], gguf_pres[i].first) && !second == (n == 1) &&
            (n == 1 || !strcmp(cut[1], second)) && gguf_pres[i].merges == !t->ignore_merges)
            return gguf_pres[i].name;
    }
    err_throw(t->ctx, RLHF_ERR_UNSUPPORTED,
              "the tokenizer cuts words%s%.60s%s in a way that llama.cpp has no pre-tokenizer for; "
              "known are those of GPT-2, SmolLM, Qwen2, Llama 3 and Tekken",
              n ? " by \"" : "", n ? cut[n - 1] : "", n ? "...\"" : "");
}

/* Whether a SentencePiece-style tokenizer puts a space before its text; anything else that
 * llama.cpp's counterpart does not do is refused. */
static int gguf_space_prefix(const rlhf_tokenizer *t) {
    int prefix = 0, spaces = 0, odd = t->ignore_merges;
    for (int i = 0; i < (int)stbds_arrlen(t->steps); i++) {
        const tok_step *st = &t->steps[i];
        if (st->kind == TOK_PREFIX && !strcmp(st->text, TOK_SPACE)) prefix = 1 + st->mode;
        else if (st->kind == TOK_REPLACE && !strcmp(st->text, TOK_SPACE)) spaces = 1;
        else odd |= st->kind != TOK_ADDED && !(st->kind == TOK_SPLIT && st->mode == TOK_WITH_NEXT);
    }
    for (int b = 0; b < 256; b++) odd |= t->byte_id[b] < 0;
    if (odd || !spaces)
        err_throw(t->ctx, RLHF_ERR_UNSUPPORTED,
                  "llama.cpp reads tokenizers with byte-level words, or with \"" TOK_SPACE
                  "\" for spaces and a token for each byte; this one has neither");
    if (prefix > 1)
        log_at(t->ctx, RLHF_LOG_WARNING,
               "llama.cpp puts a space before every piece of text between special tokens; this "
               "tokenizer %s",
               prefix == 1 + TOK_FIRST ? "only before the first" : "not before another space");
    return prefix > 0;
}

/* llama.cpp merges whatever makes a piece, the piece of the highest score first: the rank of the
 * first merge that makes it stands for that, if every pair that makes a piece is a merge. */
static void gguf_key_scores(gguf_head *h, rlhf_tokenizer *t, const int *type, int n) {
    float *score = mem_zalloc(h->ctx, (size_t)n, sizeof *score);
    for (int i = t->n_rules - 1; i >= 0; i--) score[t->rules[i].id] = -(float)i;
    tok_buf left = {h->ctx, NULL, 0, 0};
    for (int id = 0; id < t->vocab_size; id++) {
        const char *text = t->pieces[id].text;
        for (int k = 1; type[id] == GGUF_NORMAL && k < t->pieces[id].len; k++) {
            left.n = 0;
            tok_put(&left, text, (size_t)k);
            int32_t a = tok_piece_id(t, left.p), b = a < 0 ? -1 : tok_piece_id(t, text + k);
            if (b >= 0 && stbds_hmgeti(t->ranks, tok_pair(a, b)) < 0)
                err_throw(h->ctx, RLHF_ERR_UNSUPPORTED,
                          "the tokenizer does not merge \"%s\" and \"%s\"; llama.cpp would, since "
                          "\"%s\" is a piece",
                          left.p, text + k, text);
        }
    }
    tok_put(gguf_list(h, "scores", GGUF_F32, n), (const char *)score, (size_t)n * sizeof *score);
    mem_free(left.p);
    mem_free(score);
}

/* The texts of n ids and what they are; scores or merges. Ids without a text get one, since
 * llama.cpp wants all of them to differ. */
static void gguf_key_tokens(gguf_head *h, rlhf_tokenizer *t, int n) {
    const char **text = mem_zalloc(h->ctx, (size_t)n, sizeof *text);
    int *type = mem_zalloc(h->ctx, (size_t)n, sizeof *type);
    for (int i = 0; i < n; i++) {
        text[i] = i < t->vocab_size ? t->pieces[i].text : NULL;
        type[i] = text[i] ? GGUF_NORMAL : GGUF_UNUSED;
    }
    for (int b = 0; b < 256 && !t->byte_level; b++) type[t->byte_id[b]] = GGUF_BYTE;
    for (int i = 0; i < (int)stbds_arrlen(t->added); i++) {
        const tok_added *a = &t->added[i];
        text[a->id] = a->content;
        type[a->id] = t->pieces[a->id].special ? GGUF_CONTROL : GGUF_USER;
    }
    if (t->unk >= 0) type[t->unk] = GGUF_UNKNOWN;

    tok_buf *b = gguf_list(h, "tokens", GGUF_STRING, n);
    for (int i = 0; i < n; i++) {
        char pad[24];
        snprintf(pad, sizeof pad, "[PAD%d]", i);
        gguf_text(b, text[i] ? text[i] : pad, strlen(text[i] ? text[i] : pad));
    }
    tok_put(gguf_list(h, "token_type", GGUF_I32, n), (const char *)type, (size_t)n * sizeof *type);
    if (!t->byte_level) gguf_key_scores(h, t, type, n);
    else b = gguf_list(h, "merges", GGUF_STRING, t->n_rules);
    for (int i = 0; i < t->n_rules && t->byte_level; i++) {
        const tok_piece *l = &t->pieces[t->rules[i].left], *r = &t->pieces[t->rules[i].right];
        gguf_u64(b, (uint64_t)l->len + (uint64_t)r->len + 1);
        tok_put(b, l->text, (size_t)l->len);
        tok_put(b, " ", 1);
        tok_put(b, r->text, (size_t)r->len);
    }
    mem_free(text);
    mem_free(type);
}

/* Tokens with a part of their own. A text ends with the tokenizer's end token if it does here, too,
 * a turn with the chat template's; a further end token of the model takes the place that is left.
 * llama.cpp knows other usual end tokens by their text. */
static void gguf_key_special(gguf_head *h, const rlhf_model *m, rlhf_tokenizer *t) {
    int n_before = (int)stbds_arrlen(t->before), n_after = (int)stbds_arrlen(t->after);
    int bos = n_before ? t->before[0] : t->bos >= 0 ? t->bos : m->bos;
    int eos = m->n_eos && !model_is_eos(m, t->eos) ? m->eos[0] : t->eos, eot = -1, eom = -1;
    const chat_template *chat = t->chat_template ? chat_detect(t, t->chat_template) : NULL;
    const char *close = chat ? chat->close[CHAT_ASSISTANT] : NULL;
    if (close) eot = tok_find(t, close);
    for (int i = 0; i < m->n_eos; i++) {
        if (m->eos[i] == eos || m->eos[i] == eot) continue;
        if (eot < 0) eot = m->eos[i];
        else if (eom < 0) eom = m->eos[i];
    }
    if (n_before > 1 || n_after > 1 || (n_after && t->after[0] != eos))
        err_throw(h->ctx, RLHF_ERR_UNSUPPORTED,
                  "the tokenizer adds more to a text than llama.cpp can: %d tokens before it, %d "
                  "after it",
                  n_before, n_after);
    if (eos < 0)
        log_at(h->ctx, RLHF_LOG_WARNING,
               "neither model nor tokenizer has an end-of-text token; llama.cpp assumes one");
    gguf_key_id(h, "bos_token_id", bos);
    gguf_key_id(h, "eos_token_id", eos);
    gguf_key_id(h, "eot_token_id", eot);
    gguf_key_id(h, "eom_token_id", eom);
    gguf_key_id(h, "unknown_token_id", t->unk);
    gguf_key_flag(h, "add_bos_token", n_before > 0);
    gguf_key_flag(h, "add_eos_token", n_after > 0);
}

/* Everything about the tokenizer; null: the file says that there is none. */
static void gguf_key_tokenizer(gguf_head *h, const rlhf_model *m, rlhf_tokenizer *t) {
    static const char group[] = "tokenizer.ggml";
    if (!t) {
        gguf_key_text(h, group, "model", "none");
        return;
    }
    if (t->vocab_size > m->c.vocab)
        err_throw(h->ctx, RLHF_ERR_ARG,
                  "the tokenizer has %d ids, the model %d: is this the model's tokenizer?",
                  t->vocab_size, m->c.vocab);
    gguf_key_text(h, group, "model", t->byte_level ? "gpt2" : "llama");
    if (t->byte_level) gguf_key_text(h, group, "pre", gguf_pre(t));
    else gguf_key_text(h, group, "pre", "default");
    if (!t->byte_level) gguf_key_flag(h, "add_space_prefix", gguf_space_prefix(t));
    gguf_key_tokens(h, t, m->c.vocab);
    gguf_key_special(h, m, t);
    if (t->chat_template) gguf_key_text(h, "tokenizer", "chat_template", t->chat_template);
}

/* ---- model ---- */

/* The row of gguf_archs, after checks that a model of its family may fail. */
static int gguf_find_arch(const rlhf_model *m) {
    const model_cfg *c = &m->c;
    const size_t n = sizeof gguf_archs / sizeof *gguf_archs;
    size_t i = 0;
    while (i < n && strcmp(gguf_archs[i].family, m->family->type)) i++;
    if (c->head == RLHF_HEAD_SCORE)
        err_throw(m->ctx, RLHF_ERR_UNSUPPORTED,
                  "a reward model has no counterpart in llama.cpp; language models have");
    if (i == n)
        err_throw(
            m->ctx, RLHF_ERR_UNSUPPORTED,
            "\"model_type\" \"%s\" is not written as GGUF; gpt2, llama, mistral and qwen2 are",
            m->family->type);
    if (!gguf_archs[i].llama && (c->rope_factor != 0 || c->heads * c->hd != c->d))
        err_throw(m->ctx, RLHF_ERR_UNSUPPORTED,
                  "llama.cpp computes scaled rotary positions, and heads that do not add up to "
                  "hidden_size, for llama and mistral only, not for %s",
                  m->family->type);
    return (int)i;
}

/* Sizes and constants. */
static void gguf_key_model(gguf_head *h, const rlhf_model *m, const gguf_kind *kind) {
    const model_cfg *c = &m->c;
    gguf_key_text(h, "general", "architecture", h->arch);
    gguf_u32(gguf_key(h, "general", "file_type", GGUF_U32), kind->file_type);
    if (kind == &gguf_q8) gguf_u32(gguf_key(h, "general", "quantization_version", GGUF_U32), 2);
    gguf_key_size(h, "vocab_size", c->vocab);
    gguf_key_size(h, "context_length",
                  c->window ? base_min(c->positions, c->window) : c->positions);
    gguf_key_size(h, "embedding_length", c->d);
    gguf_key_size(h, "block_count", c->layers);
    gguf_key_size(h, "feed_forward_length", c->ff);
    gguf_key_size(h, "attention.head_count", c->heads);
    gguf_key_size(h, "attention.head_count_kv", c->kv_heads);
    gguf_key_real(
        h, c->layer_norm ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon",
        c->eps);
    if (c->learned_pos) return;
    gguf_key_size(h, "attention.key_length", c->hd);
    gguf_key_size(h, "attention.value_length", c->hd);
    gguf_key_size(h, "rope.dimension_count", c->hd);
    gguf_key_real(h, "rope.freq_base", c->theta);
}

/* Completes a tensor whose rows and name are set, and its entry in the head. */
static void gguf_place(gguf_head *h, gguf_tensor *t, const gguf_kind *kind) {
    t->kind = t->one_dim ? &gguf_f32 : t->cols % kind->block ? &gguf_f16 : kind;
    gguf_text(&h->infos, t->name, strlen(t->name));
    gguf_u32(&h->infos, t->one_dim ? 1 : 2);
    if (!t->one_dim) gguf_u64(&h->infos, t->cols);
    gguf_u64(&h->infos, t->rows);
    gguf_u32(&h->infos, t->kind->type);
    gguf_u64(&h->infos, h->size);
    size_t bytes = t->rows * t->cols / t->kind->block * t->kind->block_bytes;
    h->size += base_round_up(bytes, GGUF_ALIGN);
    h->n_tensors++;
}

/* All tensors in the order of the family's list, a block; *n becomes their number. Positions are
 * added, not multiplied: they stay exact, as norms and biases do. */
static gguf_tensor *gguf_tensors(gguf_head *h, const rlhf_model *m, const gguf_kind *kind,
                                 int llama, int *n) {
    int cap = 1;
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        cap += model_param_layers(m, t->param);
    gguf_tensor *list = mem_zalloc(h->ctx, (size_t)cap, sizeof *list), *o = list;
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        for (int l = 0; l < model_param_layers(m, t->param); l++, o++) {
            size_t i = 0, count = sizeof gguf_names / sizeof *gguf_names;
            while (i < count && (gguf_names[i].param != t->param || gguf_names[i].part != t->part))
                i++;
            if (i == count)
                err_throw(m->ctx, RLHF_ERR_UNSUPPORTED,
                          "tensor \"%s%s\" has no counterpart in llama.cpp", m->family->prefix,
                          t->name);
            const char *name = gguf_names[i].name, *mark = strstr(name, "%d");
            if (mark)
                snprintf(o->name, sizeof o->name, "%.*s%d%s", (int)(mark - name), name, l,
                         mark + 2);
            else snprintf(o->name, sizeof o->name, "%s", name);
            ckpt_tensor x = ckpt_tensor_of(m, t, l, 1);
            o->w = x.data, o->rows = x.rows, o->one_dim = !x.cols, o->cols = x.cols ? x.cols : 1;
            int sorted = llama && (t->part == PART_Q || t->part == PART_K);
            o->hd = sorted ? (size_t)m->c.hd : 0;
            gguf_place(h, o, t->param == P_WPE ? &gguf_f32 : kind);
        }
    *n = (int)(o - list);
    return list;
}

/* By what llama.cpp divides each frequency, as a tensor at the end of the list; w becomes a block.
 * Needed where frequencies are slowed. */
static void gguf_add_factors(gguf_head *h, const rlhf_model *m, gguf_tensor *o) {
    model_cfg plain = m->c;
    plain.rope_factor = 0;
    int half = m->c.hd / 2;
    float *factor = mem_alloc(h->ctx, (size_t)half * sizeof *factor);
    for (int j = 0; j < half; j++)
        factor[j] = model_rope_frequency(&plain, j) / model_rope_frequency(&m->c, j);
    *o = (gguf_tensor){"rope_freqs.weight", NULL, factor, (size_t)half, 1, 0, 1};
    gguf_place(h, o, &gguf_f32);
}

/* ---- numbers ---- */

/* One block of q8_0: the largest number is 127, of either sign. Returns its scale in half
 * precision; with one that is not finite there is no block. */
static uint16_t gguf_pack_block(const float *w, unsigned char *out) {
    float most = 0;
    for (int i = 0; i < GGUF_BLOCK; i++) {
        if (isnan(w[i])) return 0x7e00;
        most = fabsf(w[i]) > most ? fabsf(w[i]) : most;
    }
    float scale = most / 127.0f, inverse = scale >= FLT_MIN ? 1.0f / scale : 0;
    uint16_t half = ckpt_to_half(scale);
    memcpy(out, &half, sizeof half);
    for (int i = 0; i < GGUF_BLOCK && half < 0x7c00; i++)
        out[2 + i] = (unsigned char)(int8_t)roundf(w[i] * inverse);
    return half;
}

/* n numbers as the kind stores them, n a multiple of its block. Returns 0 if one is beyond its
 * range. */
static int gguf_pack(const gguf_kind *kind, const float *w, size_t n, unsigned char *out) {
    uint16_t v = 0, over = 0;
    if (kind == &gguf_f32) memcpy(out, w, n * sizeof *w);
    for (size_t i = 0; kind != &gguf_f32 && i < n; i += kind->block, out += kind->block_bytes) {
        v = kind == &gguf_q8    ? gguf_pack_block(w + i, out)
            : kind == &gguf_f16 ? ckpt_to_half(w[i])
                                : v_half1(w[i]);
        if (kind != &gguf_q8) memcpy(out, &v, sizeof v);
        over |= kind != &gguf_bf16 && (v & 0x7c00) == 0x7c00;
    }
    return !over;
}

/* Writes the numbers of one tensor and the gap behind them. Sorting: row 2 j + half of a head is
 * its row half hd / 2 + j here. */
static void gguf_write_tensor(io_file *f, const gguf_tensor *t) {
    static const char zeros[GGUF_ALIGN];
    size_t row_bytes = t->cols / t->kind->block * t->kind->block_bytes, bytes = t->rows * row_bytes;
    unsigned char *row = mem_alloc(f->ctx, row_bytes);
    for (size_t r = 0; r < t->rows; r++) {
        size_t in = t->hd ? r % t->hd : 0, from = t->hd ? r - in + in % 2 * t->hd / 2 + in / 2 : r;
        if (!gguf_pack(t->kind, t->w + from * t->cols, t->cols, row))
            err_throw(f->ctx, RLHF_ERR_NUMERIC,
                      "tensor \"%s\" has numbers beyond half precision; f32 and bf16 hold them",
                      t->name);
        io_write(f, row, row_bytes);
    }
    io_write(f, zeros, base_round_up(bytes, GGUF_ALIGN) - bytes);
    mem_free(row);
}

/* Writes the file of a model that has all its weights as floats; t may be null. */
static void gguf_write(const rlhf_model *m, rlhf_tokenizer *t, const char *path, const char *type) {
    static const gguf_kind *const kinds[] = {&gguf_f32, &gguf_f16, &gguf_bf16, &gguf_q8};
    rlhf_ctx *ctx = m->ctx;
    const gguf_kind *kind = NULL;
    for (int i = 0; i < 4; i++)
        if (!strcmp(kinds[i]->name, type)) kind = kinds[i];
    if (!kind) err_throw(ctx, RLHF_ERR_ARG, "type is \"%s\", expected one of " GGUF_KINDS, type);
    int arch = gguf_find_arch(m), n;
    gguf_head h = {.ctx = ctx, .arch = gguf_archs[arch].arch};
    h.keys.ctx = h.infos.ctx = ctx;
    gguf_key_model(&h, m, kind);
    gguf_key_tokenizer(&h, m, t);
    gguf_tensor *list = gguf_tensors(&h, m, kind, gguf_archs[arch].llama, &n);
    if (m->c.rope_factor != 0) gguf_add_factors(&h, m, list + n++);

    tok_buf start = {ctx, NULL, 0, 0};
    tok_put(&start, "GGUF", 4);
    gguf_u32(&start, GGUF_VERSION);
    gguf_u64(&start, h.n_tensors);
    gguf_u64(&start, h.n_keys);
    io_file *f = io_create(ctx, path);
    io_write(f, start.p, start.n);
    io_write(f, h.keys.p, h.keys.n);
    io_write(f, h.infos.p, h.infos.n);
    size_t head = start.n + h.keys.n + h.infos.n;
    io_write(f, (const char[GGUF_ALIGN]){0}, base_round_up(head, GGUF_ALIGN) - head);
    for (int i = 0; i < n; i++) gguf_write_tensor(f, list + i);
    io_commit(f);
    if (m->c.rope_factor != 0) mem_free((float *)(uintptr_t)list[n - 1].w);
    mem_free(start.p);
    mem_free(h.keys.p);
    mem_free(h.infos.p);
    mem_free(list);
}

/* The same of any model. The same model and tokenizer give the same bytes. */
static void gguf_save(rlhf_model *m, rlhf_tokenizer *t, const char *path, const char *type) {
    if (!m->base) {
        gguf_write(m, t, path, type);
        return;
    }
    rlhf_model *whole = ckpt_copy_model(m, m->c.head);
    model_thaw(whole);
    gguf_write(whole, t, path, type);
    err_keep(m->ctx);
    err_release(m->ctx);
    model_free(whole);
}

/* ============================================================================================
 * MARK: - 22 OPT (opt_)
 * AdamW with global-norm clipping over one or more models, and learning-rate schedules. The norm is
 * summed in double over chunks that the problem fixes, in order.
 *
 * The optimizer owns gradients and both moments, arrays of its models' layout, and lends the
 * gradients to the models while a trainer is open. Work is split into chunks of one parameter each:
 * a chunk either decays or does not, and its sum of squares is one term of the norm. A trained
 * model takes 16 bytes for each weight with its gradient and moments. Between steps, gradients are
 * zero, and their memory is lent for the panels that sampling wants.
 *
 * A step of a trainer is
 *     opt_zero        gradients are 0
 *     backward passes add to them, one for each micro-batch
 *     opt_step        joins, norm, clipping, AdamW; the models' version changes
 *
 * Entry: opt_new, opt_attach, opt_zero, opt_step, opt_lend.
 * Tests: test/test_train.c, test/test_golden.c
 * ============================================================================================ */

/* OPT_CHUNK is part of the result's bits, through the order of the norm's terms. */
enum { OPT_CHUNK = 16384, OPT_MODELS = 2 };

/* Floats [at, at + n) of one model's arrays; decay: weight decay applies. */
typedef struct opt_chunk {
    int model;
    size_t at;
    int n, decay;
} opt_chunk;

/* One optimizer over its models; arrays by model, as are learning rates. */
typedef struct opt {
    rlhf_ctx *ctx;
    int models;
    rlhf_model *model[OPT_MODELS];
    float *g[OPT_MODELS], *m[OPT_MODELS], *v[OPT_MODELS];
    op_sparse *embed[OPT_MODELS]; /* of a matrix with two uses: one chain of sums for each use,
                                 so that cutting a batch into micro-batches changes no bit;
                                 else null */
    int64_t step;             /* steps done: t of the bias corrections */
    int clean;                /* all gradients are zero */
    double beta1, beta2, eps, weight_decay, max_norm;
    opt_chunk *chunk;
    double *part; /* one sum of squares for each chunk */
    int64_t chunks;
    k_adam now[OPT_MODELS][2]; /* constants of the current step, without and with decay */
} opt;

/* b^n by squaring: the same bits everywhere. */
static double opt_power(double b, int64_t n) {
    double r = 1;
    for (; n > 0; n >>= 1, b *= b)
        if (n & 1) r *= b;
    return r;
}

/* Factor on the learning rate of step k (from 0) of total, as Hugging Face's schedules: the first
 * warm-up step is 0. kind: "constant", "linear" to 0, "cosine" to 0 along half a wave. */
static double opt_schedule(const char *kind, int64_t k, int64_t warmup, int64_t total) {
    if (k < warmup) return (double)k / (double)(warmup > 1 ? warmup : 1);
    /* p: share of the steps behind the warm-up. */
    double left = (double)(total - warmup > 1 ? total - warmup : 1);
    double p = (double)(k - warmup) / left;
    if (!strcmp(kind, "linear")) return p < 1 ? (double)(total - k) / left : 0;
    if (!strcmp(kind, "cosine")) {
        float s, c;
        v_sincos1((float)(3.141592653589793 * (p < 1 ? p : 1)), &s, &c);
        return 0.5 * (1.0 + (double)c);
    }
    return 1;
}

/* Appends the chunks of one model's weights, gaps left out, or counts them. */
static void opt_add_chunks(opt *o, int model, int count_only) {
    const rlhf_model *m = o->model[model];
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_own_layers(m, p); l++)
            for (size_t i = 0; i < m->slot[p].n; i += OPT_CHUNK) {
                size_t n = m->slot[p].n - i < OPT_CHUNK ? m->slot[p].n - i : OPT_CHUNK;
                if (!count_only)
                    o->chunk[o->chunks] =
                        (opt_chunk){model, model_at(m, p, l) + i, (int)n, model_decays(m, p)};
                o->chunks++;
            }
}

/* Optimises the given models together: one norm, one step count. Allocates 3 floats for each
 * weight; beta1 ... max_norm are the caller's to set, the models must outlive the optimizer. */
static opt *opt_new(rlhf_ctx *ctx, rlhf_model *const *models, int n) {
    opt *o = mem_zalloc(ctx, 1, sizeof *o);
    o->ctx = ctx;
    o->models = n;
    for (int i = 0; i < n; i++) {
        o->model[i] = models[i];
        o->g[i] = mem_zalloc(ctx, models[i]->n, sizeof(float));
        o->m[i] = mem_zalloc(ctx, models[i]->n, sizeof(float));
        o->v[i] = mem_zalloc(ctx, models[i]->n, sizeof(float));
        /* One matrix, two uses: opt_join. */
        if (models[i]->c.tied && models[i]->c.head == RLHF_HEAD_LM && !models[i]->base)
            o->embed[i] = op_sparse_new(ctx, models[i]->c.vocab, models[i]->c.d);
        opt_add_chunks(o, i, 1);
    }
    o->chunk = mem_zalloc(ctx, (size_t)o->chunks, sizeof *o->chunk);
    o->part = mem_zalloc(ctx, (size_t)o->chunks, sizeof *o->part);
    o->chunks = 0;
    for (int i = 0; i < n; i++) opt_add_chunks(o, i, 0);
    return o;
}

/* Lends the gradient arrays to the models; opt_free takes them back. */
static void opt_attach(opt *o) {
    for (int i = 0; i < o->models; i++) {
        o->model[i]->g = o->g[i];
        o->model[i]->g_embed = o->embed[i];
    }
}

/* Gives everything back; a model that holds gradients of another optimizer keeps them. */
static void opt_free(opt *o) {
    for (int i = 0; i < o->models; i++) {
        if (o->model[i]->g == o->g[i]) o->model[i]->g = NULL, o->model[i]->g_embed = NULL;
        if (o->model[i]->room == o->g[i]) model_place_panels(o->model[i], NULL, 0);
        op_sparse_free(o->embed[i]);
        mem_free(o->g[i]);
        mem_free(o->m[i]);
        mem_free(o->v[i]);
    }
    mem_free(o->chunk);
    mem_free(o->part);
    mem_free(o);
}

/* Zeroes the gradients of chunks [lo, hi). */
static void opt_zero_range(void *arg, int64_t lo, int64_t hi, int thread) {
    opt *o = arg;
    (void)thread;
    for (int64_t i = lo; i < hi; i++)
        memset(o->g[o->chunk[i].model] + o->chunk[i].at, 0, (size_t)o->chunk[i].n * sizeof(float));
}

/* Makes all gradients zero, before the first batch of a step, and drops panels: the weights that
 * they are of are about to change. A step that succeeds leaves gradients zero; one that fails does
 * not. */
static void opt_zero(opt *o) {
    for (int i = 0; i < o->models; i++) {
        model_place_panels(o->model[i], NULL, 0);
        if (!o->clean && o->embed[i]) op_sparse_clear(o->embed[i]);
    }
    if (!o->clean) par_for(o->ctx, o->chunks, 1, opt_zero_range, o);
    o->clean = 0;
}

/* Takes what memory steps of up to so many tokens need, before the first of several that are to
 * succeed or fail together. */
static void opt_reserve(opt *o, int64_t tokens) {
    for (int i = 0; i < o->models; i++)
        if (o->embed[i]) op_sparse_reserve(o->embed[i], tokens);
}

/* Lends the gradients' memory for panels until the next step begins: products of few rows come
 * between steps, when gradients are zero. */
static void opt_lend(opt *o) {
    for (int i = 0; i < o->models; i++) model_place_panels(o->model[i], o->g[i], o->model[i]->n);
    o->clean = 0;
}

/* Sums of squares of chunks [lo, hi). */
static void opt_norm_range(void *arg, int64_t lo, int64_t hi, int thread) {
    opt *o = arg;
    (void)thread;
    for (int64_t i = lo; i < hi; i++)
        o->part[i] = o->ctx->k->sumsq(o->chunk[i].n, o->g[o->chunk[i].model] + o->chunk[i].at);
}

/* One model's embedding and the gradient that it joins. */
typedef struct opt_joint {
    const k_table *k;
    const op_sparse *part;
    float *g; /* of the whole matrix */
} opt_joint;

/* Rows [lo, hi) of the part. */
static void opt_join_range(void *arg, int64_t lo, int64_t hi, int thread) {
    const opt_joint *j = arg;
    (void)thread;
    for (int i = (int)lo; i < hi; i++)
        j->k->add(j->part->d, op_sparse_row(j->part, i),
                  j->g + (size_t)j->part->id[i] * (size_t)j->part->d);
}

/* Adds the embedding's part to the gradient of a matrix that is embedding and head. Apart until
 * here, each part is one chain over the rows of all micro-batches; in one array their terms would
 * interleave differently for every way of cutting the batch. */
static void opt_join(opt *o) {
    for (int i = 0; i < o->models; i++) {
        if (!o->embed[i]) continue;
        opt_joint j = {o->ctx->k, o->embed[i], o->g[i] + model_at(o->model[i], P_WTE, 0)};
        par_for(o->ctx, j.part->n, par_grain(2 * j.part->d), opt_join_range, &j);
        op_sparse_clear(o->embed[i]);
    }
}

/* The Euclidean norm over all gradients of all models. */
static double opt_norm(opt *o) {
    par_for(o->ctx, o->chunks, 1, opt_norm_range, o);
    double sum = 0;
    for (int64_t i = 0; i < o->chunks; i++) sum += o->part[i];
    return sqrt(sum);
}

/* AdamW on chunks [lo, hi). */
static void opt_step_range(void *arg, int64_t lo, int64_t hi, int thread) {
    opt *o = arg;
    (void)thread;
    for (int64_t i = lo; i < hi; i++) {
        opt_chunk c = o->chunk[i];
        o->ctx->k->adam(c.n, o->model[c.model]->w + c.at, o->g[c.model] + c.at,
                        o->m[c.model] + c.at, o->v[c.model] + c.at, &o->now[c.model][c.decay]);
    }
}

/* One AdamW step (Loshchilov and Hutter 2019; formula: k_r_adam) with lr[i] for model i; returns
 * the gradient norm before clipping. Decoupled decay: p <- p (1 - lr weight_decay) - lr step. A
 * norm that is not finite is thrown and changes nothing. */
static double opt_step(opt *o, const double *lr) {
    opt_join(o);
    double norm = opt_norm(o);
    if (!isfinite(norm))
        err_throw(o->ctx, RLHF_ERR_NUMERIC,
                  "step %lld: the gradient is not finite; the weights are those of the optimizer "
                  "step before "
                  "(a lower learning_rate may help)",
                  (long long)o->step + 1);
    /* As PyTorch's clip_grad_norm_: max_norm / (norm + 1e-6), one factor for all models. */
    double clip = o->max_norm > 0 && norm > o->max_norm ? o->max_norm / (norm + 1e-6) : 1;
    o->step++;
    /* Constants in double, each rounded once. */
    for (int i = 0; i < o->models; i++) {
        k_adam a = {.lr = (float)lr[i],
                    .beta1 = (float)o->beta1,
                    .beta2 = (float)o->beta2,
                    .rest1 = (float)(1.0 - o->beta1),
                    .rest2 = (float)(1.0 - o->beta2),
                    .eps = (float)o->eps,
                    .decay = 1,
                    .clip = (float)clip,
                    .fix1 = (float)(1.0 / (1.0 - opt_power(o->beta1, o->step))),
                    .fix2 = (float)(1.0 / (1.0 - opt_power(o->beta2, o->step)))};
        o->now[i][0] = o->now[i][1] = a;
        o->now[i][1].decay = (float)(1.0 - lr[i] * o->weight_decay);
    }
    par_for(o->ctx, o->chunks, 1, opt_step_range, o);
    o->clean = 1;
    for (int i = 0; i < o->models; i++) o->model[i]->version++;
    return norm;
}

/* ============================================================================================
 * MARK: - 23 DATA (data_)
 * Records of every kind, read by one loader for every stage. A record becomes token sequences whose
 * tokens are marked where they bear loss: assistant turns with their end, completions, or all of a
 * plain text. Text is tokenised whole; where a part begins is found as the longest common prefix
 * with the tokens of what precedes it. A record that cannot be used is an error with file:line; one
 * that is too long is dropped and counted, never cut.
 *
 * Whole, because prompt and answer tokenised apart would differ from the text at the seam, where a
 * merge may cross it. A token that crosses belongs to the later part.
 *
 *     form                                         SFT, SCORE     PREFERENCE    PROMPT
 *     text                                         all            -             -
 *     messages | conversations                     all            by label      all but the answer
 *     prompt | instruction + completion [+ label]  both           by label      prompt
 *     [prompt +] chosen + rejected                 chosen (SFT)   the pair      prompt, or shared
 *     prompt + responses + ranking | best          best (SFT)     its pairs     prompt
 *     prompt + two answers + choice                best (SFT)     the pair      prompt
 *     all: domain, annotator, annotator_type, weight, margin, soft_label, each optional
 *     two answers: aspects, with a choice on each; all that are judged or written: qualified
 *
 * By label: each good answer is paired with each bad one to the same prompt; SFT leaves out what is
 * labelled false. The pairs of one ranking, or of one prompt's labels, weigh as much as one record.
 * A record is a, of a pair a (chosen) and b (rejected), each with its prompt.
 *
 * Entry: data_open, data_parse, data_order.
 * Invariant: everything that a record points at lies in its dataset's store.
 * Tests: test/test_data.c
 * ============================================================================================ */

/* One token sequence. loss[t] = 1: the prediction of token t counts; loss[0] never does, since
 * nothing precedes it. */
typedef struct data_seq {
    int n;
    int32_t *ids;
    uint8_t *loss;
    int turns, *end; /* config.turns: assistant turn k is the last of the first end[k] tokens */
    const int32_t *turn_end; /* of a conversation: also ends an answer to it; null: no such token */
} data_seq;

/* One usable record. */
typedef struct data_record {
    char *line;                                      /* the record as one line of JSON */
    char *prompt;                                    /* rendered text of the prompt, kind PROMPT */
    const char *domain, *annotator, *annotator_type; /* null where the record has none */
    double weight, margin; /* PREFERENCE: of the pair's loss; 1 and 0 where not given */
    double doubt;          /* PREFERENCE: P(rejected is the better one), 0 where not known */
    data_seq a, b;         /* the sequence, or the prompt; PREFERENCE: chosen and rejected */
} data_record;

/* Why a record is left out. */
enum {
    DATA_LONG,
    DATA_FALSE,
    DATA_TIED,
    DATA_SINGLE,
    DATA_UNQUALIFIED,
    DATA_OTHER_ASPECT,
    DATA_WHYS
};
static const char *const data_whys[DATA_WHYS] = {
    "longer than",
    "labelled false",
    "no answer is better than another",
    "no answer with the other label to the same prompt",
    "by somebody not qualified (use_unqualified takes them)",
    "without the aspect"};

/* Usable records, in the order of the file. */
struct rlhf_dataset {
    rlhf_ctx *ctx;
    rlhf_data_config config;
    data_record *record; /* in store, as is all they point at */
    int n, cap, dropped;
    int why[DATA_WHYS]; /* parts of dropped */
    int64_t tokens;     /* in all sequences */
    int32_t turn_end;   /* the chat template's end of turn, see data_turn_end */
    arena store;
};

/* Answers to one prompt that have a label: bad ones and good ones, in the order of the file. */
typedef struct data_loose {
    struct data_loose *next;
    data_record rec;
    const char *place; /* file:line */
} data_loose;
typedef struct data_group {
    data_loose *first[2], *last[2];
    int n[2];
} data_group;
typedef struct data_prompt_group {
    char *key;
    data_group value;
} data_prompt_group;

/* Which judgements count. */
typedef struct data_judged {
    const char *aspect; /* "": the overall choice */
    int use_unqualified;
    json_t *aspects; /* of the records so far: {name: 1} */
} data_judged;

/* The state of reading one file. */
typedef struct data_reader {
    rlhf_dataset *d;
    data_judged judged;
    rlhf_tokenizer *tok;
    const char *chat;         /* name of the chat template, or "auto" */
    json_src src;             /* of the record at hand */
    data_prompt_group *loose; /* stb_ds: text of a prompt -> its labelled answers */
} data_reader;

/* A member of a record and its name, which stands in messages. v null: absent. */
typedef struct data_member {
    const char *key;
    json_t *v;
} data_member;

enum { DATA_MAX_ANSWERS = 64 }; /* in one record */

/* For err_defer: a dataset whose reading failed. */
static void data_drop_store(void *store) { arena_free(store); }

/* n bytes of s and a NUL, in the store. */
static char *data_keep(rlhf_dataset *d, const char *s, size_t n) {
    char *p = arena_alloc(&d->store, n + 1);
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

/* Throws RLHF_ERR_DATA: "file:line: text" about the record at hand. */
__attribute__((noreturn)) static void data_bad(const data_reader *r, const char *text) {
    char place[512];
    err_throw(r->d->ctx, RLHF_ERR_DATA, "%s: %s", json_place(&r->src, place, sizeof place), text);
}

/* ---- tokens ---- */

/* Length of the longest common prefix. */
static int data_common(const tok_ids *a, const tok_ids *b) {
    int n = base_min(a->n, b->n), i = 0;
    while (i < n && a->ids[i] == b->ids[i]) i++;
    return i;
}

/* Marks the tokens of text[from, to) in s, whose ids are those of the whole text: from the first
 * token that differs from the tokens of text[0, from), up to where those of text[0, to) end to
 * agree. special: as in tok_encode, and as `whole` was made. */
static void data_mark(const data_reader *r, const char *text, size_t from, size_t to, int special,
                      const tok_ids *whole, data_seq *s) {
    tok_ids before = {0}, through = {0};
    tok_encode(r->tok, text, from, special, &before);
    tok_encode(r->tok, text, to, special, &through);
    int lo = data_common(whole, &before), hi = data_common(whole, &through);
    if (to == strlen(text)) hi = whole->n;
    for (int t = base_max(lo, 1); t < hi; t++) s->loss[t] = 1;
    mem_free(before.ids);
    mem_free(through.ids);
}

/* A sequence in the store from ids; an end-of-text token that bears loss follows if asked for and
 * not there. */
static data_seq data_seq_new(const data_reader *r, const tok_ids *ids, int add_eos) {
    int eos = r->tok->eos;
    int extra = add_eos && eos >= 0 && (ids->n == 0 || ids->ids[ids->n - 1] != eos);
    data_seq s = {.n = ids->n + extra};
    s.ids = arena_alloc(&r->d->store, (size_t)(s.n + 1) * sizeof *s.ids);
    s.loss = arena_alloc(&r->d->store, (size_t)s.n + 1);
    memset(s.loss, 0, (size_t)s.n + 1);
    if (ids->n) memcpy(s.ids, ids->ids, (size_t)ids->n * sizeof *s.ids);
    /* The end bears loss, so that a model learns to stop. */
    if (extra) {
        s.ids[ids->n] = eos;
        s.loss[ids->n] = 1;
    } else if (add_eos && ids->n > 1) {
        s.loss[ids->n - 1] = 1;
    }
    return s;
}

/* prompt + completion as one text; the completion bears loss, and with `all`, or where the config
 * asks, the prompt too. */
static data_seq data_text_seq(const data_reader *r, const char *prompt, const char *completion,
                              int all) {
    rlhf_ctx *ctx = r->d->ctx;
    size_t np = strlen(prompt), nc = strlen(completion);
    char *text = mem_alloc(ctx, np + nc + 1);
    memcpy(text, prompt, np);
    memcpy(text + np, completion, nc + 1);
    tok_ids ids = {0};
    tok_encode(r->tok, text, np + nc, 1, &ids);
    data_seq s = data_seq_new(r, &ids, r->d->config.add_eos);
    if (all || !r->d->config.completion_only_loss)
        memset(s.loss + 1, 1, (size_t)base_max(s.n - 1, 0));
    else data_mark(r, text, np, np + nc, 1, &ids, &s);
    mem_free(ids.ids);
    mem_free(text);
    return s;
}

/* ---- conversations ---- */

/* A growing conversation; the texts stay the record's. */
typedef struct data_chat {
    chat_message *message;
    int n, cap;
} data_chat;

/* Appends one turn. */
static void data_chat_add(const data_reader *r, data_chat *c, const char *role,
                          const char *content) {
    if (c->n == c->cap) {
        c->cap = c->cap ? 2 * c->cap : 8;
        c->message = mem_realloc(r->d->ctx, c->message, (size_t)c->cap * sizeof *c->message);
    }
    c->message[c->n++] = (chat_message){role, content};
}

/* The role of a turn {"role", "content"}, or of ShareGPT's {"from", "value"}. */
static const char *data_role(const data_reader *r, const json_t *turn) {
    static const char *const names[][2] = {{"system", "system"},       {"user", "user"},
                                           {"assistant", "assistant"}, {"human", "user"},
                                           {"gpt", "assistant"},       {"chatgpt", "assistant"},
                                           {"bot", "assistant"},       {"model", "assistant"}};
    const char *key = json_get(turn, "role") || !json_get(turn, "from") ? "role" : "from";
    const char *role = json_need_str(&r->src, turn, key);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(role, names[i][0])) return names[i][1];
    json_bad(&r->src, key, json_get(turn, key),
             *key == 'r' ? "system, user or assistant" : "system, human or gpt");
}

/* Appends a list of turns, one turn, or a string as a turn of the assistant. */
static void data_chat_read(const data_reader *r, data_chat *c, data_member m) {
    size_t n = json_is_array(m.v) ? json_array_size(m.v) : 1;
    if (json_is_string(m.v)) {
        data_chat_add(r, c, "assistant", json_string_value(m.v));
        return;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *turn = json_is_array(m.v) ? json_array_get(m.v, i) : m.v;
        if (!json_is_object(turn))
            json_bad(&r->src, m.key, turn, "a list of {\"role\", \"content\"}");
        const char *key =
            json_get(turn, "content") || !json_get(turn, "value") ? "content" : "value";
        const char *role = data_role(r, turn);
        data_chat_add(r, c, role, json_need_str(&r->src, turn, key));
    }
}

static int data_is_answer(const chat_message *m) { return !strcmp(m->role, "assistant"); }

/* Templates without a token that ends a turn leave beginning and end of text to the tokenizer. */
static int data_chat_is_text(const data_reader *r) {
    return !chat_choose(r->tok, r->chat)->close[CHAT_ASSISTANT];
}

/* The token that ends an answer in a conversation, kept by the dataset, or null. */
static const int32_t *data_turn_end(const data_reader *r) {
    r->d->turn_end = chat_end(r->tok, chat_choose(r->tok, r->chat));
    return r->d->turn_end < 0 ? NULL : &r->d->turn_end;
}

/* The conversation as text, a block, see chat_render. */
static char *data_chat_text(const data_reader *r, const data_chat *c, int generate, chat_span *span,
                            int *spans) {
    const chat_template *t = chat_choose(r->tok, r->chat);
    const char *bad = chat_check(t, c->message, c->n);
    char text[256];
    if (bad) {
        snprintf(text, sizeof text, "%s: %s", t->name, bad);
        data_bad(r, text);
    }
    return chat_render(r->tok, r->chat, c->message, c->n, generate, span, spans);
}

/* Notes where each span of the text ends in the sequence; the last one ends with it. */
static void data_ends(const data_reader *r, const char *text, const chat_span *span, int spans,
                      int special, const tok_ids *whole, data_seq *s) {
    s->end = arena_alloc(&r->d->store, (size_t)spans * sizeof *s->end);
    for (s->turns = 0; s->turns < spans - 1; s->turns++) {
        tok_ids through = {0};
        tok_encode(r->tok, text, span[s->turns].end, special, &through);
        s->end[s->turns] = base_max(data_common(whole, &through), 1);
        mem_free(through.ids);
    }
    s->end[s->turns++] = s->n;
}

/* The conversation as tokens. skip: assistant turns at its start that bear no loss, -1 = all but
 * the last. It ends with the last assistant turn's end. */
static data_seq data_chat_seq(const data_reader *r, const data_chat *c, int skip) {
    rlhf_ctx *ctx = r->d->ctx;
    if (c->n == 0 || !data_is_answer(&c->message[c->n - 1]))
        data_bad(r, "a conversation to learn from ends with a turn of the assistant");
    chat_span *span = mem_alloc(ctx, (size_t)c->n * sizeof *span);
    int spans = 0, special = data_chat_is_text(r);
    /* What a template puts behind the last turn is never predicted, and cut off. */
    char *text = data_chat_text(r, c, 0, span, &spans);
    text[span[spans - 1].end] = 0;
    tok_ids ids = {0};
    tok_encode(r->tok, text, strlen(text), special, &ids);
    data_seq s = data_seq_new(r, &ids, special && r->d->config.add_eos);
    s.turn_end = data_turn_end(r);
    /* A record that will be dropped for its length is not worth marking. */
    int fits = s.n <= r->d->config.max_length;
    for (int i = skip < 0 ? spans - 1 : skip; fits && i < spans; i++)
        data_mark(r, text, span[i].start, span[i].end, special, &ids, &s);
    if (fits && r->d->config.turns) data_ends(r, text, span, spans, special, &ids, &s);
    mem_free(ids.ids);
    mem_free(text);
    mem_free(span);
    return s;
}

/* ---- forms ---- */

/* What a record says, whatever its form: a whole text or conversation, or answers to a prompt. */
typedef struct data_form {
    data_member whole;  /* "text", or turns; then no answers */
    data_member prompt; /* a text or turns; v null: none, or each answer holds it */
    const char *system; /* text that begins the conversation, or null (ShareGPT, Alpaca) */
    json_t *history;    /* earlier pairs of question and answer, or null (Alpaca) */
    char *question;     /* instruction and input, a block in place of prompt, or null */
    int label;          /* whether a single answer is good; -1: not said */
    int n;              /* answers */
    size_t shared;      /* bytes of two texts that are their prompt */
    data_member answer[DATA_MAX_ANSWERS];
    double rank[DATA_MAX_ANSWERS]; /* the lower, the better */
} data_form;

/* The first member of those names (null-terminated) that is there. */
static data_member data_first(const json_t *j, const char *const *names) {
    for (; *names; names++)
        if (json_get(j, *names)) return (data_member){*names, json_get(j, *names)};
    return (data_member){0};
}

/* Throws unless the member is a text without NUL, or turns. A NUL, which JSON allows, would cut the
 * text: it is a C string from here on. */
static void data_check(const data_reader *r, data_member m) {
    int turn = json_is_object(m.v) && (json_get(m.v, "content") || json_get(m.v, "value"));
    if (json_is_string(m.v) && strlen(json_string_value(m.v)) != json_string_length(m.v))
        json_bad(&r->src, m.key, m.v, "a string without NUL characters");
    if (!json_is_string(m.v) && !json_is_array(m.v) && !turn)
        json_bad(&r->src, m.key, m.v, "a string or a list of turns");
}

/* Adds an answer. */
static void data_add_answer(const data_reader *r, data_form *f, const char *key, json_t *v,
                            double rank) {
    data_member m = {key, v};
    data_check(r, m);
    f->answer[f->n] = m;
    f->rank[f->n++] = rank;
}

/* "responses" with their "ranking", one place each of which 1 is the best and equal ones are ties,
 * or with the index of the "best" one. */
static void data_read_ranking(const data_reader *r, json_t *j, data_form *f) {
    json_t *list = json_need_array(&r->src, j, "responses");
    json_t *ranking = json_opt_array(&r->src, j, "ranking");
    int n = (int)json_array_size(list), best = -1;
    if (n < 2 || n > DATA_MAX_ANSWERS) json_bad(&r->src, "responses", list, "2 to 64 answers");
    if (!ranking && !json_get(j, "best"))
        data_bad(r, "\"responses\" need a \"ranking\" or the \"best\"");
    if (!ranking) best = (int)json_need_int(&r->src, j, "best", 0, n - 1);
    if (ranking && (int)json_array_size(ranking) != n)
        json_bad(&r->src, "ranking", ranking, "a number for each of \"responses\"");
    for (int i = 0; i < n; i++) {
        json_t *place = json_array_get(ranking, (size_t)i);
        if (ranking && !json_is_number(place)) json_bad(&r->src, "ranking", place, "numbers");
        data_add_answer(r, f, "responses", json_array_get(list, (size_t)i),
                        ranking ? json_number_value(place) : i != best);
    }
}

/* One of two answers as "choice", "gold" and "order" name them: 0 or "A", 1 or "B"; -1: neither. */
static int data_side(const json_t *v) {
    static const char names[] = "AaBb";
    const char *text = json_string_value(v), *at = text && *text ? strchr(names, *text) : NULL;
    if (at && !text[1]) return (int)(at - names) / 2;
    return json_is_integer(v) && !(json_integer_value(v) & ~1LL) ? (int)json_integer_value(v) : -1;
}

/* What a "choice" says: DATA_A, DATA_B, DATA_TIE (also both bad), DATA_SKIP. */
enum { DATA_A, DATA_B, DATA_TIE, DATA_SKIP };
static int data_choice(const json_src *src, const json_t *j) {
    const json_t *v = json_get(j, "choice");
    const char *text = json_string_value(v);
    if (data_side(v) >= 0) return data_side(v);
    if (text && (!strcmp(text, "tie") || !strcmp(text, "both_bad"))) return DATA_TIE;
    if (text && !strcmp(text, "skip")) return DATA_SKIP;
    json_bad(src, "choice", v, "0, 1, \"A\", \"B\", \"tie\", \"both_bad\" or \"skip\"");
}

/* Why a judgement does not count, or -1. An aspect's choice takes the place of the record's overall
 * one; what is known to be right of that, is not of the aspect. */
static int data_judge(const data_judged *q, const json_src *src, json_t *j) {
    if (!json_opt_bool(src, j, "qualified", 1) && !q->use_unqualified) return DATA_UNQUALIFIED;
    if (!*q->aspect) return -1;
    json_t *aspects = json_opt_object(src, j, "aspects"), *v;
    const char *name;
    json_object_foreach(aspects, name, v)
        if (json_object_set_new(q->aspects, name, json_true()))
            err_throw(src->ctx, RLHF_ERR_MEMORY, "out of memory for a JSON value");
    v = json_get(aspects, q->aspect);
    if (!v) return DATA_OTHER_ASPECT;
    if (!json_get(j, "answers")) json_bad(src, "answers", NULL, "two, which \"aspects\" compare");
    json_object_set(j, "choice", v);
    json_object_del(j, "gold");
    return -1;
}

/* Throws if no record has the aspect that is asked for. */
static void data_need_aspect(const data_judged *q, rlhf_ctx *ctx, const char *name) {
    char list[400] = "";
    const char *aspect;
    json_t *v;
    if (!*q->aspect || json_object_get(q->aspects, q->aspect)) return;
    json_object_foreach(q->aspects, aspect, v) {
        size_t at = strlen(list);
        snprintf(list + at, sizeof list - at, "%s%s", at ? ", " : "", aspect);
    }
    err_throw(ctx, RLHF_ERR_DATA, "%s: no record has the aspect \"%s\"; there %s%s", name,
              q->aspect, *list ? "are: " : "are no \"aspects\"", list);
}

/* "answers" with the "choice" between two of them. Where neither was chosen, or nothing yet, no
 * answer is better than another; one that was found bad is not to be learnt. */
static void data_read_answers(const data_reader *r, json_t *j, data_form *f) {
    json_t *list = json_need_array(&r->src, j, "answers");
    int n = (int)json_array_size(list), has_choice = json_get(j, "choice") != NULL;
    int choice = has_choice ? data_choice(&r->src, j) : DATA_TIE;
    if (n < 2 || n > (has_choice ? 2 : DATA_MAX_ANSWERS))
        json_bad(&r->src, "answers", list, has_choice ? "two answers" : "2 to 64 answers");
    for (int i = 0; i < n; i++)
        data_add_answer(r, f, "answers", json_array_get(list, (size_t)i),
                        choice <= DATA_B && i != choice);
    const char *text = json_string_value(json_get(j, "choice"));
    if (choice == DATA_SKIP || (text && !strcmp(text, "both_bad"))) f->label = 0;
}

/* Bytes that two transcripts share as their prompt: up to the last "\n\nAssistant:" before they
 * part, else up to where they part, a space belonging to the answers. */
static size_t data_shared(const char *a, const char *b) {
    static const char turn[] = "\n\nAssistant:";
    size_t n = 0, at = 0;
    /* n: where they part. at: behind the last such turn before that. */
    while (a[n] && a[n] == b[n]) n++;
    for (const char *p = a; (p = strstr(p, turn)) && (size_t)(p - a) + sizeof turn - 1 <= n; p++)
        at = (size_t)(p - a) + sizeof turn - 1;
    if (at) return at;
    while (n && ((unsigned char)a[n] & 0xc0) == 0x80) n--; /* whole characters */
    return n && a[n - 1] == ' ' ? n - 1 : n;
}

/* "chosen" and "rejected". Answers that are whole conversations hold their prompt; two texts
 * without a prompt share it. */
static void data_read_pair(const data_reader *r, json_t *j, data_form *f) {
    json_t *a = json_get(j, "chosen"), *b = json_get(j, "rejected");
    if (!a) data_bad(r, "missing \"chosen\"");
    if (!b) data_bad(r, "missing \"rejected\"");
    data_add_answer(r, f, "chosen", a, 0);
    data_add_answer(r, f, "rejected", b, 1);
    const json_t *first = json_array_get(a, 0);
    if (json_is_string(f->prompt.v) && first && strcmp(data_role(r, first), "assistant"))
        f->prompt.v = NULL;
    if (!f->prompt.v && !f->question && json_is_string(a) && json_is_string(b))
        f->shared = data_shared(json_string_value(a), json_string_value(b));
}

/* Alpaca's "instruction", "input", "system" and "history". */
static void data_read_question(const data_reader *r, json_t *j, data_form *f) {
    const char *input = json_opt_str(&r->src, j, "input", "");
    const char *text = json_need_str(&r->src, j, "instruction");
    f->question = mem_printf(r->d->ctx, "%s%s%s", text, *input ? "\n" : "", input);
    f->system = json_opt_str(&r->src, j, "system", NULL);
    f->history = json_opt_array(&r->src, j, "history");
}

/* Whether the last of the turns is the assistant's. */
static int data_is_answered(const data_reader *r, const json_t *turns) {
    size_t n = json_array_size(turns);
    const json_t *last = n ? json_array_get(turns, n - 1) : NULL;
    return json_is_object(last) && !strcmp(data_role(r, last), "assistant");
}

/* A label is true or false, or 1 or 0. */
static int data_label(const data_reader *r, const json_t *j) {
    const json_t *v = json_get(j, "label");
    if (json_is_integer(v)) return (int)json_need_int(&r->src, j, "label", 0, 1);
    return v ? json_opt_bool(&r->src, j, "label", 0) : -1;
}

/* Finds out what a record says. Where members of several forms stand side by side, the kind says
 * which of them counts. */
static void data_read_form(const data_reader *r, json_t *j, data_form *f) {
    static const char *const answers[] = {"completion", "response", "output", "answer", NULL};
    static const char *const talks[] = {"messages", "conversations", NULL};
    static const char *const prompts[] = {"prompt", NULL};
    rlhf_data_kind kind = r->d->config.kind;
    data_member talk = data_first(j, talks), one = data_first(j, answers);
    int pair = json_get(j, "chosen") || json_get(j, "rejected");
    int many = pair || json_get(j, "responses") || json_get(j, "answers");
    memset(f, 0, offsetof(data_form, answer));
    f->label = -1;
    f->prompt = data_first(j, prompts);
    if (f->prompt.v) data_check(r, f->prompt);
    /* Further members of a prompt are the reward function's. */
    if (kind == RLHF_DATA_PROMPT && f->prompt.v) return;
    if (talk.v && !json_is_array(talk.v))
        json_bad(&r->src, talk.key, talk.v, "a list of {\"role\", \"content\"}");
    if (talk.v && *talk.key == 'c') f->system = json_opt_str(&r->src, j, "system", NULL);
    int is_whole = !many || kind == RLHF_DATA_PROMPT ||
                   (kind != RLHF_DATA_PREFERENCE && data_is_answered(r, talk.v));
    if (talk.v && is_whole) f->whole = talk;
    else if (talk.v && !f->prompt.v) f->prompt = talk;
    else if (json_get(j, "instruction") && !f->prompt.v) data_read_question(r, j, f);
    if (f->whole.v) f->label = data_label(r, j);
    else if (json_get(j, "responses")) data_read_ranking(r, j, f);
    else if (pair) data_read_pair(r, j, f);
    else if (many) data_read_answers(r, j, f);
    else if (one.v && (f->prompt.v || f->question)) {
        data_add_answer(r, f, one.key, one.v, 0);
        f->label = data_label(r, j);
    } else if (json_get(j, "text") && kind != RLHF_DATA_PROMPT && kind != RLHF_DATA_PREFERENCE) {
        json_need_str(&r->src, j, "text");
        f->whole = (data_member){"text", json_get(j, "text")};
    }
}

/* ---- prompts and answers ---- */

/* Appends the turns of the prompt; a text is the user's. */
static void data_prompt_turns(const data_reader *r, const data_form *f, data_chat *c) {
    size_t i;
    json_t *pair;
    if (f->system) data_chat_add(r, c, "system", f->system);
    json_array_foreach(f->history, i, pair) {
        const char *q = json_string_value(json_array_get(pair, 0));
        const char *a = json_string_value(json_array_get(pair, 1));
        if (!q || !a) json_bad(&r->src, "history", pair, "pairs of texts");
        data_chat_add(r, c, "user", q);
        data_chat_add(r, c, "assistant", a);
    }
    if (f->question) data_chat_add(r, c, "user", f->question);
    else if (json_is_string(f->prompt.v))
        data_chat_add(r, c, "user", json_string_value(f->prompt.v));
    else if (f->prompt.v) data_chat_read(r, c, f->prompt);
}

/* Answer i after the prompt: two texts are joined as they are, turns on either side make it a
 * conversation. Only the answer bears loss, of a whole conversation its last turn. */
static data_seq data_answer(const data_reader *r, const data_form *f, int i) {
    const json_t *v = f->answer[i].v;
    int has_prompt = f->prompt.v || f->question || f->system, skip = 0;
    if (json_is_string(v) && !f->question && !json_is_array(f->prompt.v)) {
        const char *text = json_string_value(v);
        if (f->prompt.v) return data_text_seq(r, json_string_value(f->prompt.v), text, 0);
        if (f->n != 2) data_bad(r, "missing \"prompt\"");
        char *head = mem_strndup(r->d->ctx, text, f->shared);
        data_seq s = data_text_seq(r, head, text + f->shared, 0);
        mem_free(head);
        return s;
    }
    data_chat c = {0};
    data_prompt_turns(r, f, &c);
    for (int k = 0; k < c.n; k++) skip += data_is_answer(&c.message[k]);
    data_chat_read(r, &c, f->answer[i]);
    data_seq s = data_chat_seq(r, &c, has_prompt ? skip : -1);
    mem_free(c.message);
    return s;
}

/* A whole text or conversation; in the latter only turns of the assistant bear loss, of one that is
 * judged as an answer the last. */
static data_seq data_whole(const data_reader *r, const data_form *f, int is_answer) {
    if (json_is_string(f->whole.v)) return data_text_seq(r, "", json_string_value(f->whole.v), 1);
    data_chat c = {0};
    if (f->system) data_chat_add(r, &c, "system", f->system);
    data_chat_read(r, &c, f->whole);
    data_seq s = data_chat_seq(r, &c, is_answer ? -1 : 0);
    mem_free(c.message);
    return s;
}

/* Appends the turns of the prompt of a record whose prompt is not a text: those of its prompt, all
 * before the last answer of a conversation, or those with which all of its answers begin. */
static void data_prompt_chat(const data_reader *r, const data_form *f, data_chat *c) {
    data_chat other = {0};
    if (f->whole.v && f->system) data_chat_add(r, c, "system", f->system);
    if (f->whole.v) data_chat_read(r, c, f->whole);
    else data_prompt_turns(r, f, c);
    if (f->whole.v && c->n && data_is_answer(&c->message[c->n - 1])) c->n--;
    if (!c->n && f->n > 1 && json_is_array(f->answer[0].v)) {
        data_chat_read(r, c, f->answer[0]);
        for (int i = 1; i < f->n; i++) {
            int k = 0;
            other.n = 0;
            data_chat_read(r, &other, f->answer[i]);
            while (k < c->n && k < other.n && !strcmp(c->message[k].role, other.message[k].role) &&
                   !strcmp(c->message[k].content, other.message[k].content))
                k++;
            c->n = k;
        }
    }
    if (!c->n) data_bad(r, "missing \"prompt\"");
    mem_free(other.message);
}

/* The text of the prompt, a block: a text as it is, or turns up to where the assistant's next one
 * begins. *special: as in tok_encode. */
static char *data_prompt_text(const data_reader *r, const data_form *f, int *special) {
    rlhf_ctx *ctx = r->d->ctx;
    data_chat c = {0};
    *special = 1;
    if (json_is_string(f->prompt.v)) return mem_strdup(ctx, json_string_value(f->prompt.v));
    if (f->shared) return mem_strndup(ctx, json_string_value(f->answer[0].v), f->shared);
    data_prompt_chat(r, f, &c);
    *special = data_chat_is_text(r);
    char *text = data_chat_text(r, &c, 1, NULL, NULL);
    mem_free(c.message);
    return text;
}

/* ---- records ---- */

/* Leaves out the record at hand, or one from `place`. */
static void data_drop(data_reader *r, const char *place, int why, int tokens) {
    char here[512];
    if (!place) place = json_place(&r->src, here, sizeof here);
    r->d->dropped++;
    r->d->why[why]++;
    if (why == DATA_LONG)
        log_at(r->d->ctx, RLHF_LOG_DEBUG, "%s: dropped: %d tokens, max_length is %d", place, tokens,
               r->d->config.max_length);
    else log_at(r->d->ctx, RLHF_LOG_DEBUG, "%s: dropped: %s", place, data_whys[why]);
}

/* Room for one record behind the last. Growing copies within the store: outgrown arrays stay
 * there. */
static data_record *data_next_slot(rlhf_dataset *d) {
    if (d->n == d->cap) {
        int cap = d->cap ? 2 * d->cap : 256;
        data_record *grown = arena_alloc(&d->store, (size_t)cap * sizeof *grown);
        if (d->n) memcpy(grown, d->record, (size_t)d->n * sizeof *grown);
        d->record = grown;
        d->cap = cap;
    }
    return d->record + d->n;
}

/* Appends a record unless it is too long or there are enough. place: null, or where it stands, if
 * that is not the line at hand. */
static void data_add(data_reader *r, const data_record *rec, const char *place) {
    rlhf_dataset *d = r->d;
    int longest = base_max(rec->a.n, rec->b.n), bears = 0;
    if (d->config.max_records >= 0 && d->n >= d->config.max_records) return;
    if (rec->a.n < 1 || (d->config.kind == RLHF_DATA_PREFERENCE && rec->b.n < 1))
        data_bad(r, "the record has no tokens");
    if (longest > d->config.max_length) {
        data_drop(r, place, DATA_LONG, longest);
        return;
    }
    for (int t = 1; t < rec->a.n; t++) bears |= rec->a.loss[t];
    if (d->config.kind == RLHF_DATA_SFT && !bears) data_bad(r, "no token of the record bears loss");
    *data_next_slot(d) = *rec;
    d->tokens += rec->a.n + rec->b.n;
    d->n++;
}

/* Kinds SFT and SCORE: a whole, the answer, or for SFT the best one of several, and none that is
 * labelled false. */
static void data_read_one(data_reader *r, const data_form *f, data_record *rec) {
    int best = 0, is_sft = r->d->config.kind == RLHF_DATA_SFT;
    if (!f->whole.v && !f->n)
        data_bad(r, f->question   ? "missing \"output\" beside \"instruction\""
                    : f->prompt.v ? "missing \"completion\" beside \"prompt\""
                                  : "expected \"text\", \"messages\", or \"prompt\" and "
                                    "\"completion\"");
    if (f->n > 1 && !is_sft) data_bad(r, "several answers; a score is asked for one in a record");
    if (is_sft && f->label == 0) {
        data_drop(r, NULL, DATA_FALSE, 0);
        return;
    }
    for (int i = 1; i < f->n; i++)
        if (f->rank[i] < f->rank[best]) best = i;
    rec->a = f->whole.v ? data_whole(r, f, 0) : data_answer(r, f, best);
    data_add(r, rec, NULL);
}

/* Kind PREFERENCE, several answers: every pair of which one ranks higher. Those that fit share the
 * record's weight, so that it counts once. */
static void data_read_pairs(data_reader *r, const data_form *f, data_record *rec) {
    data_seq seq[DATA_MAX_ANSWERS];
    int most = r->d->config.max_length, pairs = 0, fit = 0;
    for (int i = 0; i < f->n; i++) seq[i] = data_answer(r, f, i);
    for (int i = 0; i < f->n * f->n; i++) {
        int a = i / f->n, b = i % f->n, is_pair = f->rank[a] < f->rank[b];
        pairs += is_pair;
        fit += is_pair && seq[a].n <= most && seq[b].n <= most;
    }
    rec->weight /= base_max(fit, 1);
    for (int i = 0; i < f->n * f->n; i++) {
        int a = i / f->n, b = i % f->n;
        if (!(f->rank[a] < f->rank[b])) continue;
        rec->a = seq[a];
        rec->b = seq[b];
        data_add(r, rec, NULL);
    }
    if (!pairs) data_drop(r, NULL, DATA_TIED, 0);
}

/* Kind PREFERENCE, one answer with a label: kept until all answers to its prompt are known. */
static void data_read_loose(data_reader *r, const data_form *f, data_record *rec) {
    char place[512];
    int special;
    if (f->label < 0)
        data_bad(r, "expected \"chosen\" and \"rejected\", \"responses\" with a \"ranking\", or an "
                    "answer with a \"label\"");
    rec->a = f->whole.v ? data_whole(r, f, 1) : data_answer(r, f, 0);
    char *prompt = data_prompt_text(r, f, &special);
    data_loose *loose = arena_alloc(&r->d->store, sizeof *loose);
    json_place(&r->src, place, sizeof place);
    *loose = (data_loose){.rec = *rec, .place = data_keep(r->d, place, strlen(place))};
    ptrdiff_t at = stbds_shgeti(r->loose, prompt);
    if (at < 0) {
        stbds_shput(r->loose, prompt, (data_group){0});
        at = stbds_shgeti(r->loose, prompt);
    }
    data_group *g = &r->loose[at].value;
    if (g->n[f->label]++) g->last[f->label]->next = loose;
    else g->first[f->label] = loose;
    g->last[f->label] = loose;
    mem_free(prompt);
}

/* Pairs every good answer with every bad one to the same prompt, as if the prompt's answers had
 * been ranked in one record: its pairs share one weight. */
static void data_pair_up(data_reader *r) {
    for (ptrdiff_t i = 0; i < stbds_shlen(r->loose); i++) {
        const data_group *g = &r->loose[i].value;
        for (const data_loose *a = g->first[1]; a; a = a->next)
            for (const data_loose *b = g->first[0]; b; b = b->next) {
                data_record rec = a->rec;
                rec.b = b->rec.a;
                rec.weight /= (double)g->n[0] * g->n[1];
                data_add(r, &rec, a->place);
            }
        for (int label = 0; label < 2 && !(g->n[0] && g->n[1]); label++)
            for (const data_loose *a = g->first[label]; a; a = a->next)
                data_drop(r, a->place, DATA_SINGLE, 0);
    }
    stbds_shfree(r->loose);
}

/* Kind PROMPT. */
static void data_read_prompt(data_reader *r, const data_form *f, data_record *rec) {
    tok_ids ids = {0};
    int special;
    char *text = data_prompt_text(r, f, &special);
    rec->prompt = data_keep(r->d, text, strlen(text));
    tok_encode(r->tok, text, strlen(text), special, &ids);
    rec->a = data_seq_new(r, &ids, 0);
    /* Only a conversation with such a token is encoded without the tokenizer's own. */
    if (!special) rec->a.turn_end = data_turn_end(r);
    data_add(r, rec, NULL);
    mem_free(ids.ids);
    mem_free(text);
}

/* An optional text member, copied into the store, or null. */
static const char *data_keep_string(const data_reader *r, const json_t *j, const char *key) {
    const char *s = json_opt_str(&r->src, j, key, NULL);
    return s ? data_keep(r->d, s, strlen(s)) : NULL;
}

/* Reads one JSON value: into records of the dataset, or drops it. */
static void data_read_record(data_reader *r, json_t *j) {
    rlhf_dataset *d = r->d;
    data_record rec = {0};
    data_form f;
    if (!json_is_object(j)) data_bad(r, "expected an object");
    /* Columns of any kind. */
    rec.domain = data_keep_string(r, j, "domain");
    rec.annotator = data_keep_string(r, j, "annotator");
    rec.annotator_type = data_keep_string(r, j, "annotator_type");
    rec.weight = json_opt_real(&r->src, j, "weight", 1);
    rec.margin = json_opt_real(&r->src, j, "margin", 0);
    if (!(rec.weight >= 0)) data_bad(r, "\"weight\" is negative");
    rec.doubt = 1 - json_opt_real(&r->src, j, "soft_label", 1);
    if (!(rec.doubt >= 0 && rec.doubt <= 1))
        json_bad(&r->src, "soft_label", json_get(j, "soft_label"), "a number from 0 to 1");
    int is_judged = d->config.kind == RLHF_DATA_PREFERENCE || d->config.kind == RLHF_DATA_SFT;
    int why = is_judged ? data_judge(&r->judged, &r->src, j) : -1;
    if (why >= 0) {
        data_drop(r, NULL, why, 0);
        return;
    }
    size_t len;
    char *line = json_text(d->ctx, j, JSON_COMPACT, &len);
    rec.line = data_keep(d, line, len);
    mem_free(line);
    /* What stands in it, and what the kind makes of that. */
    data_read_form(r, j, &f);
    if (d->config.kind == RLHF_DATA_PROMPT) data_read_prompt(r, &f, &rec);
    else if (d->config.kind != RLHF_DATA_PREFERENCE) data_read_one(r, &f, &rec);
    else if (f.n > 1) data_read_pairs(r, &f, &rec);
    else data_read_loose(r, &f, &rec);
    mem_free(f.question);
}

/* JSON lines; empty ones are skipped, but counted for messages. A number of records ends it
 * early. */
static void data_read_lines(data_reader *r, const char *text, size_t len) {
    const char *end = text + len;
    int64_t line = 1;
    for (const char *p = text; p < end; line++) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        const char *q = p;
        while (q < stop && strchr(" \t\r", *q)) q++;
        if (q < stop && (r->d->config.max_records < 0 || r->d->n < r->d->config.max_records)) {
            r->src.line = line;
            data_read_record(r, json_parse(&r->src, p, (size_t)(stop - p)));
            err_release(r->d->ctx);
        }
        p = stop + 1;
    }
}

/* Says what was dropped and why: a warning for each reason, or an error if nothing is left. */
static void data_report(const data_reader *r, const char *name) {
    rlhf_dataset *d = r->d;
    data_need_aspect(&r->judged, d->ctx, name);
    char text[400] = "";
    for (int i = 0; i < DATA_WHYS; i++) {
        size_t at = strlen(text);
        char bound[40] = "";
        if (!d->why[i]) continue;
        if (i == DATA_LONG) snprintf(bound, sizeof bound, " %d tokens", d->config.max_length);
        snprintf(text + at, sizeof text - at, "%s%d %s%s", at ? ", " : "", d->why[i], data_whys[i],
                 bound);
        if (d->n)
            log_at(d->ctx, RLHF_LOG_WARNING, "%s: %d of %d records dropped: %s%s", name, d->why[i],
                   d->n + d->dropped, data_whys[i], bound);
    }
    if (d->n) return;
    if (!d->dropped) err_throw(d->ctx, RLHF_ERR_DATA, "%s: no records", name);
    err_throw(d->ctx, RLHF_ERR_DATA, "%s: none of %d records can be used: %s%s", name, d->dropped,
              text,
              d->why[DATA_SINGLE] ? "; alone they serve fine-tuning (if true) and as prompts" : "");
}

/* Reads JSON lines, or one JSON array, from memory. name stands for the file in messages. A dataset
 * without a usable record is an error. */
static rlhf_dataset *data_parse(rlhf_ctx *ctx, const char *text, size_t len, const char *name,
                                rlhf_tokenizer *tok, const rlhf_data_config *config) {
    rlhf_dataset *d = mem_zalloc(ctx, 1, sizeof *d);
    d->ctx = ctx;
    d->config = *config;
    d->store.ctx = ctx;
    err_defer(ctx, data_drop_store, &d->store);
    const char *aspect = config->kind == RLHF_DATA_PREFERENCE ? config->aspect : NULL;
    d->config.aspect = aspect ? data_keep(d, aspect, strlen(aspect)) : "";
    data_reader r = {.d = d,
                     .judged = {d->config.aspect, config->use_unqualified,
                                json_hold(ctx, json_object())},
                     .tok = tok,
                     .chat = config->chat_template ? config->chat_template : "auto"};
    if (strcmp(r.chat, "auto")) chat_choose(tok, r.chat);
    stbds_sh_new_strdup(r.loose);
    r.src = json_source(ctx, name);
    r.src.status = RLHF_ERR_DATA;
    /* A '[' that opens the text makes it one array; lines hold objects. */
    if (len >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) text += 3, len -= 3; /* a byte order mark */
    size_t i = 0;
    while (i < len && strchr(" \t\r\n", text[i])) i++;
    if (i < len && text[i] == '[') {
        json_t *list = json_parse(&r.src, text, len), *item;
        char at[512];
        json_array_foreach(list, i, item) {
            if (config->max_records >= 0 && d->n >= config->max_records) break;
            snprintf(at, sizeof at, "%s[%zu]", name, i);
            r.src.file = at;
            data_read_record(&r, item);
        }
        err_release(ctx);
    } else {
        data_read_lines(&r, text, len);
    }
    data_pair_up(&r);
    data_report(&r, name);
    err_release(ctx);
    err_keep(ctx);
    return d;
}

/* The same from a file, plain or gzip. */
static rlhf_dataset *data_open(rlhf_ctx *ctx, const char *path, rlhf_tokenizer *tok,
                               const rlhf_data_config *config) {
    size_t len;
    char *text = io_read(ctx, path, IO_LIMIT, &len);
    rlhf_dataset *d = data_parse(ctx, text, len, path, tok, config);
    mem_free(text);
    return d;
}

/* The texts and ids that records point at go with the store. */
static void data_free(rlhf_dataset *d) {
    arena_free(&d->store);
    mem_free(d);
}

/* Order of the n records in an epoch into order[n]: a function of seed and epoch alone, so that a
 * resumed run draws it again. */
static void data_order(uint64_t seed, int64_t epoch, int shuffle, int n, int *order) {
    if (shuffle) rng_permutation(seed, RNG_ORDER, (uint64_t)epoch, n, order);
    else
        for (int i = 0; i < n; i++) order[i] = i;
}

/* ============================================================================================
 * MARK: - 24 GEN (gen_)
 * Sampling and batched generation. All live rows go through the model as one ragged batch: a row
 * that was just admitted brings its whole prompt, the others one token; a finished row leaves at
 * once and a waiting prompt takes its slot. A prompt that a live row has too is not computed again:
 * its row copies what the other's cache holds and feeds the last token. A sample depends on the
 * weights, its prompt, the seed and its key alone, and its log-probabilities are those that
 * training computes, bit for bit.
 *
 * A slot is the cache of one row: keys and values of every layer, with room for the longest item.
 * Its next owner starts at position 0 and overwrites what is there before a result depends on it.
 * Memory is slots x layers x 2 kv_heads hd x positions floats; logits are held for the live rows
 * only.
 *
 * Entry: gen_run.
 * Invariant: token t of an answer uses the number (seed, RNG_SAMPLE + key, t), whatever the batch.
 * Tests: test/test_gen.c
 * ============================================================================================ */

/* How to sample. Log-probabilities are those of the distribution that is drawn from: after
 * temperature, top_k and top_p. */
typedef struct gen_config {
    int max_new, top_k, batch;
    float temperature; /* 0: greedy */
    double top_p;      /* 1: all */
    uint64_t seed;
    int stop; /* the id that ends an answer; -1: the model's end-of-text ids, an item's turn_end */
} gen_config;

/* One answer. The caller provides the arrays of max_new entries; logp and hidden ([max_new][d], the
 * normed states the tokens were drawn from) may be null. */
typedef struct gen_item {
    const int32_t *prompt;
    int n_prompt;
    uint64_t key;            /* number of the sample; two of one run differ */
    const int32_t *turn_end; /* besides the model's end-of-text ids, or null; see data_seq */
    int32_t *out;
    float *logp, *hidden;
    int n, finished; /* tokens in out; 1: the last of them ends the answer */
} gen_item;

/* One step's logits and what is drawn from them, for all live rows. */
typedef struct gen_rows {
    const k_table *k;
    const gen_config *c;
    gen_item **item; /* of each live row */
    float *logits;   /* [live][vocab] */
    int vocab;
    int32_t *token; /* [live] */
    float *logp;
} gen_rows;

/* For qsort, largest first. */
static int gen_greater(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Leaves only the top_k most likely tokens, of those only the fewest that hold the share top_p; the
 * others become -inf. Tokens as likely as the last one left are left too, so that the order of ids
 * decides nothing. x and sorted are [vocab]. */
static void gen_truncate(const gen_rows *g, float *x, float *sorted) {
    int n = g->vocab, keep = g->c->top_k > 0 ? base_min(g->c->top_k, n) : n;
    float scale = 1.0f / g->c->temperature;
    memcpy(sorted, x, (size_t)n * sizeof *x);
    qsort(sorted, (size_t)n, sizeof *sorted, gen_greater);
    if (g->c->top_p < 1) {
        k_stats s = g->k->stats(keep, sorted, scale);
        double mass = 0;
        for (int i = 0; i < keep; i++) {
            mass += (double)v_exp1(sorted[i] * scale - s.lse);
            if (mass >= g->c->top_p) keep = i + 1;
        }
    }
    /* Everything below the least likely token that is kept goes. */
    float least = sorted[keep - 1];
    for (int i = 0; i < n; i++)
        if (x[i] < least) x[i] = -INFINITY;
}

/* Draws the next token of rows [lo, hi) by inversion (k_draw), or takes the first most likely
 * one. */
static void gen_pick_rows(void *arg, int64_t lo, int64_t hi, int thread) {
    gen_rows *g = arg;
    (void)thread;
    for (int64_t r = lo; r < hi; r++) {
        float *x = g->logits + (size_t)r * (size_t)g->vocab;
        const gen_item *it = g->item[r];
        int greedy = g->c->temperature == 0, id = 0;
        float scale = greedy ? 1.0f : 1.0f / g->c->temperature;
        k_stats s = g->k->stats(g->vocab, x, scale);
        if (greedy) {
            for (int i = 1; i < g->vocab; i++)
                if (x[i] > x[id]) id = i;
        } else {
            double u = rng_uniform(g->c->seed, RNG_SAMPLE + it->key, (uint64_t)it->n);
            id = k_draw(g->k, g->vocab, x, scale, s.lse, u);
        }
        /* Of the distribution that was drawn from: lse is that of the truncated logits. */
        g->token[r] = id;
        g->logp[r] = x[id] * scale - s.lse;
    }
}

/* Positions that each slot's cache needs. Throws for prompts that leave no room for a token. */
static int gen_longest(const rlhf_model *m, const gen_item *items, int n, int max_new) {
    int longest = 0;
    for (int i = 0; i < n; i++) {
        if (items[i].n_prompt < 1)
            err_throw(m->ctx, RLHF_ERR_ARG,
                      "prompt %d has no tokens (the tokenizer has no beginning-of-text token)", i);
        if (items[i].n_prompt >= m->c.positions)
            err_throw(m->ctx, RLHF_ERR_CONTEXT,
                      "prompt %d has %d tokens: the model has %d positions", i, items[i].n_prompt,
                      m->c.positions);
        longest = base_max(longest, items[i].n_prompt + max_new);
    }
    return base_min(longest, m->c.positions);
}

/* A row of the batch; its cache is slot `slot`. past: tokens of the prompt that are in the cache
 * before the row's first step. lead, of a held row: the slot where its prompt will be. */
typedef struct gen_row {
    gen_item *item;
    int slot, past, lead;
} gen_row;

/* The rows that have a slot: live ones, and held ones, whose prompt goes through the model in the
 * coming step as that of a live row. */
typedef struct gen_live {
    int n, held, slots;
    gen_row *row, *hold;
    op_kv *kv; /* [layers][slots] */
    uint8_t *busy;
} gen_live;

/* A live row with the same prompt, or null. */
static const gen_row *gen_same_prompt(const gen_live *live, const gen_item *it) {
    for (const gen_row *r = live->row; r < live->row + live->n; r++)
        if (r->item->n_prompt == it->n_prompt &&
            !memcmp(r->item->prompt, it->prompt, (size_t)it->n_prompt * sizeof *it->prompt))
            return r;
    return NULL;
}

/* Makes a row live whose prompt is in another slot: all but the last token need not be computed. */
static void gen_join(const rlhf_model *m, gen_live *live, gen_row row, int from) {
    for (int l = 0; l < m->c.layers; l++) {
        const op_kv *kv = live->kv + l * live->slots, *a = kv + from, *b = kv + row.slot;
        memcpy(b->k, a->k, op_kv_k_size(m->c.kv_heads, m->c.hd, a->cap) * sizeof *a->k);
        memcpy(b->v, a->v, op_kv_v_size(m->c.kv_heads, m->c.hd, a->cap) * sizeof *a->v);
    }
    row.past = row.item->n_prompt - 1;
    live->row[live->n++] = row;
}

/* Gives free slots to the items from `next` on, as long as the prompts to be computed have no more
 * tokens than a batch may; returns the first item without a slot. */
static int gen_admit(const rlhf_model *m, gen_live *live, gen_item *items, int next, int n) {
    int fresh = 0, most = model_batch_tokens(m);
    for (int s = 0; s < live->slots && next < n; s++) {
        if (live->busy[s]) continue;
        gen_row row = {.item = items + next, .slot = s};
        const gen_row *same = gen_same_prompt(live, row.item);
        if (!same && fresh && fresh + row.item->n_prompt > most) break;
        row.item->n = row.item->finished = 0;
        live->busy[s] = 1;
        next++;
        if (!same) {
            fresh += row.item->n_prompt;
            live->row[live->n++] = row;
        } else if (same->item->n) {
            gen_join(m, live, row, same->slot);
        } else {
            row.lead = same->slot;
            live->hold[live->held++] = row;
        }
    }
    return next;
}

/* Feeds every live row's new tokens and draws the next token of each. Everything but the caches and
 * the items goes back with the mark. */
static void gen_step(rlhf_model *m, arena *ws, const gen_config *c, gen_live *live) {
    arena_mark mark = arena_save(ws);
    int n = live->n, rows = 0;
    model_run run = {.seqs = n};
    op_seq *seq = arena_alloc(ws, (size_t)n * sizeof *seq);
    int *last = arena_alloc(ws, (size_t)n * sizeof *last);
    gen_item **item = arena_alloc(ws, (size_t)n * sizeof *item);
    /* A row without tokens of its own is new: what is not cached of its prompt. Others: the token
     * drawn last. */
    for (int i = 0; i < n; i++) {
        const gen_item *it = item[i] = live->row[i].item;
        int past = it->n ? it->n_prompt + it->n - 1 : live->row[i].past;
        seq[i] = (op_seq){.row = rows, .n = it->n ? 1 : it->n_prompt - past, .past = past};
        rows += seq[i].n;
        last[i] = rows - 1;
    }
    int32_t *ids = arena_alloc(ws, (size_t)rows * sizeof *ids);
    int32_t *pos = arena_alloc(ws, (size_t)rows * sizeof *pos);
    for (int i = 0; i < n; i++)
        for (int t = 0; t < seq[i].n; t++) {
            int at = seq[i].past + t;
            ids[seq[i].row + t] = item[i]->n ? item[i]->out[item[i]->n - 1] : item[i]->prompt[at];
            pos[seq[i].row + t] = at;
        }
    /* The caches of the live rows, in the order of the batch. */
    run.rows = rows, run.ids = ids, run.pos = pos, run.seq = seq;
    run.kv = arena_alloc(ws, (size_t)(m->c.layers * n) * sizeof *run.kv);
    for (int l = 0; l < m->c.layers; l++)
        for (int i = 0; i < n; i++)
            run.kv[l * n + i] = live->kv[l * live->slots + live->row[i].slot];
    /* Only the last row of each sequence meets the vocabulary. */
    model_forward(m, ws, &run);
    model_top top = model_top_fwd(m, ws, run.x, last, n);
    op_weight w = model_head_weight(m, n);
    op_env e = {m->ctx, ws};
    gen_rows g = {.k = m->ctx->k, .c = c, .item = item, .vocab = m->c.vocab};
    g.logits = arena_floats(ws, (size_t)n, (size_t)m->c.vocab);
    g.token = arena_alloc(ws, (size_t)n * sizeof *g.token);
    g.logp = arena_floats(ws, (size_t)n, 1);
    op_logits(&e, &w, n, top.h, g.logits);
    if (c->temperature > 0 && ((c->top_k > 0 && c->top_k < m->c.vocab) || c->top_p < 1)) {
        float *sorted = arena_floats(ws, (size_t)m->c.vocab, 1);
        for (int i = 0; i < n; i++)
            gen_truncate(&g, g.logits + (size_t)i * (size_t)m->c.vocab, sorted);
    }
    par_for(m->ctx, n, par_grain(4 * g.vocab), gen_pick_rows, &g);
    for (int i = 0; i < n; i++) {
        gen_item *it = item[i];
        size_t d = (size_t)m->c.d;
        if (it->hidden)
            memcpy(it->hidden + (size_t)it->n * d, top.h + (size_t)i * d, d * sizeof(float));
        if (it->logp) it->logp[it->n] = g.logp[i];
        it->out[it->n++] = g.token[i];
        it->finished = c->stop >= 0 ? g.token[i] == c->stop
                                    : model_is_eos(m, g.token[i]) ||
                                          (it->turn_end && g.token[i] == *it->turn_end);
    }
    arena_restore(ws, mark);
}

/* Generates all n items, at most c->batch at a time, in order of admission. Returns 0 if the
 * progress hook asked to stop; items not finished by then hold what they have. what: the name of
 * the work for the hook, null: it is not called. Caches lie in ws until the end. */
static int gen_run(rlhf_model *m, arena *ws, const gen_config *c, gen_item *items, int n,
                   const char *what) {
    if (n == 0) return 1;
    arena_mark mark = arena_save(ws);
    int slots = base_min(c->batch, n), longest = gen_longest(m, items, n, c->max_new);
    gen_live live = {.slots = slots};
    live.row = arena_alloc(ws, (size_t)slots * sizeof *live.row);
    live.hold = arena_alloc(ws, (size_t)slots * sizeof *live.hold);
    live.kv = arena_alloc(ws, (size_t)(m->c.layers * slots) * sizeof *live.kv);
    for (int i = 0; i < m->c.layers * slots; i++) live.kv[i] = model_kv_new(m, ws, longest);
    live.busy = arena_alloc(ws, (size_t)slots);
    memset(live.busy, 0, (size_t)slots);
    int next = 0, done = 0, go_on = 1;
    double begun = base_now();
    int64_t tokens = 0;
    size_t most = 0; /* bytes that a step without new prompts has taken so far */
    while (done < n && go_on) {
        int admitted = next;
        next = gen_admit(m, &live, items, next, n);
        /* In one block: new pages for each product of each step would take much of its time. */
        if (next == admitted) arena_reserve(ws, most, 0);
        ws->high = ws->total;
        gen_step(m, ws, c, &live);
        if (next == admitted && ws->high - ws->total > most) most = ws->high - ws->total;
        tokens += live.n;
        int stepped = live.n, kept = 0;
        for (int i = 0; i < live.held; i++) gen_join(m, &live, live.hold[i], live.hold[i].lead);
        live.held = 0;
        /* Finished rows leave; the others close up, each with its slot. */
        for (int i = 0; i < live.n; i++) {
            const gen_item *it = live.row[i].item;
            int full = it->n == c->max_new || it->n_prompt + it->n == m->c.positions;
            if (i < stepped && (it->finished || full)) {
                live.busy[live.row[i].slot] = 0;
                done++;
                continue;
            }
            live.row[kept++] = live.row[i];
        }
        live.n = kept;
        if (what && m->ctx->hooks.progress) {
            rlhf_progress p = {what, done, n, tokens, base_now() - begun, NULL};
            go_on = !m->ctx->hooks.progress(m->ctx->hooks.user, &p);
        }
    }
    arena_restore(ws, mark);
    return go_on;
}

/* The text of an answer without special tokens, a block. Ids that pad the model's vocabulary beyond
 * the tokenizer's stand for nothing. */
static char *gen_text(rlhf_tokenizer *tok, const int32_t *ids, int n) {
    int32_t *known = mem_alloc(tok->ctx, (size_t)(n + 1) * sizeof *known);
    int k = 0;
    for (int i = 0; i < n; i++)
        if (ids[i] < tok->vocab_size) known[k++] = ids[i];
    char *text = tok_decode(tok, known, k, 1, NULL);
    mem_free(known);
    return text;
}

/* ============================================================================================
 * MARK: - 25 ROLL (roll_)
 * One batch of episodes and the arithmetic between scores and advantages: KL penalty, where the
 * score goes, whitening, generalised advantage estimation, the adaptive KL coefficient. Rows are
 * ragged; a mean over tokens is a sum over all of them by their number.
 *
 * State t of an answer is what precedes its token t; logp[t], value[t], reward[t] and adv[t] belong
 * to it. Sums are in double, in order of rows and tokens.
 *
 * Entry: roll_rewards, roll_whiten, roll_gae, roll_adapt_kl.
 * Tests: test/test_roll.c (hand-computed values)
 * ============================================================================================ */

/* One episode: a prompt, its sampled answer and all that is computed about it. Arrays are the
 * update's, in the trainer's arena. */
typedef struct roll_row {
    const data_record *record;
    int index;       /* of the record */
    int32_t *ids;    /* prompt, then answer */
    int n_prompt, n; /* n: tokens of the answer, its end included */
    int n_value;     /* states that have a value: n, or n + 1 where the score goes behind the end */
    int finished;    /* 1: the answer ended by itself */
    float score;     /* reward of the answer, penalty included */
    float *hidden;   /* [n][d] policy states the tokens were drawn from */
    float *logp, *ref_logp, *kl, *entropy; /* [n]; kl is the exact KL(policy || reference) */
    float *value, *reward, *adv, *ret;     /* [n_value] */
} roll_row;

/* Rewards of the states (Ziegler et al. 2019; Stiennon et al. 2020): r_t = -coef kl_t, plus the
 * score at the last state. kl_t is estimated from the sampled token, u = log p - log p_ref:
 *     k1 = u                unbiased, of either sign
 *     k3 = e^-u - 1 + u     unbiased, never negative, less variance (Schulman 2020)
 * Returns the sum of the penalty over the answer, as it enters the reward: <= 0 for k3. */
static double roll_rewards(roll_row *r, double coef, int k3) {
    double sum = 0;
    for (int t = 0; t < r->n_value; t++) r->reward[t] = 0;
    for (int t = 0; t < r->n; t++) {
        double u = (double)r->logp[t] - (double)r->ref_logp[t];
        double kl = k3 ? (double)v_exp1((float)-u) - 1.0 + u : u;
        r->reward[t] = (float)(-coef * kl);
        sum += -coef * kl;
    }
    r->reward[r->n_value - 1] += r->score;
    return sum;
}

/* Generalised advantage estimation (Schulman et al. 2016), backward over the states:
 *     delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}
 *     R_t = A_t + V_t
 * V and A behind the last state are 0: an answer cut at the length limit counts as ended. */
static void roll_gae(roll_row *r, double gamma, double lam) {
    double adv = 0, next = 0;
    for (int t = r->n_value - 1; t >= 0; t--) {
        adv = (double)r->reward[t] + gamma * next - (double)r->value[t] + gamma * lam * adv;
        next = (double)r->value[t];
        r->adv[t] = (float)adv;
        r->ret[t] = (float)(adv + next);
    }
}

/* Pieces of arrays that are whitened together. */
typedef struct roll_piece {
    float *x;
    int n;
} roll_piece;

/* Whitens all pieces together: x <- (x - mean) / sqrt(var + 1e-8) with n - 1 in the variance, as
 * TRL. keep_mean adds the mean again. Fewer than two numbers stay as they are. */
static void roll_whiten(roll_piece *p, int pieces, int keep_mean) {
    double sum = 0, sq = 0;
    int64_t n = 0;
    for (int i = 0; i < pieces; i++) {
        for (int t = 0; t < p[i].n; t++) sum += (double)p[i].x[t];
        n += p[i].n;
    }
    if (n < 2) return;
    double mean = sum / (double)n;
    for (int i = 0; i < pieces; i++)
        for (int t = 0; t < p[i].n; t++)
            sq += ((double)p[i].x[t] - mean) * ((double)p[i].x[t] - mean);
    double scale = 1.0 / sqrt(sq / (double)(n - 1) + 1e-8);
    for (int i = 0; i < pieces; i++)
        for (int t = 0; t < p[i].n; t++)
            p[i].x[t] = (float)(((double)p[i].x[t] - mean) * scale + (keep_mean ? mean : 0));
}

/* The proportional controller of Ziegler et al. (2019); kl is the mean over answers of the sum over
 * tokens:
 *     e = clip(kl / target - 1, -0.2, 0.2)        coef <- coef (1 + e episodes / horizon)
 * The clip keeps one odd batch from moving it far. */
static double roll_adapt_kl(double coef, double kl, double target, int episodes, double horizon) {
    double err = kl / target - 1;
    err = err > 0.2 ? 0.2 : err < -0.2 ? -0.2 : err;
    return coef * (1 + err * episodes / horizon);
}

/* ============================================================================================
 * MARK: - 26 TRAIN (train_)
 * What every trainer has: configuration tables, schedule, metrics, what is trained of a model, and
 * how much memory the run takes. A trainer supplies what a step is (28, 29, 30).
 *
 * Entry: train_new, train_optimizer, train_plan, train_put.
 * Tests: test/test_train.c
 * ============================================================================================ */

/* Names that one trainer may put; further ones are dropped. */
enum { TRAIN_METRICS = 96 };

/* The part that all configurations begin with; the defaults do not matter for the members. */
typedef struct train_config {
    RLHF_TRAIN_FIELDS(RLHF_MEMBER_, 0, 0, 0, 0)
} train_config;

/* A trainer reads its own configuration through train_config. */
#define TRAIN_SAME(type)                                                                           \
    _Static_assert(offsetof(type, learning_rate) == offsetof(train_config, learning_rate) &&       \
                       offsetof(type, resume) == offsetof(train_config, resume),                   \
                   "a configuration begins with the common fields")
TRAIN_SAME(rlhf_sft_config);
TRAIN_SAME(rlhf_rm_config);
TRAIN_SAME(rlhf_ppo_config);

/* One row of the public table (rlhf_field) for each kind of field. In rows of kind S the third and
 * fourth argument are the default and the choices. */
#define TRAIN_FIELD_I(type, name, def, lo, hi, help)                                               \
    {'I', #name, offsetof(type, name), (double)(def), (double)(lo), (double)(hi), NULL, NULL, help},
#define TRAIN_FIELD_R(type, name, def, lo, hi, help)                                               \
    {'R', #name, offsetof(type, name), (double)(def), (double)(lo), (double)(hi), NULL, NULL, help},
#define TRAIN_FIELD_B(type, name, def, lo, hi, help)                                               \
    {'B', #name, offsetof(type, name), (double)(def), (double)(lo), (double)(hi), NULL, NULL, help},
#define TRAIN_FIELD_S(type, name, def, lo, hi, help)                                               \
    {'S', #name, offsetof(type, name), 0, 0, 0, def, lo, help},

/* The lists of rlhf.h, expanded for each struct. */
#define TRAIN_ROW_SFT(kind, ...) TRAIN_FIELD_##kind(rlhf_sft_config, __VA_ARGS__)
#define TRAIN_ROW_RM(kind, ...) TRAIN_FIELD_##kind(rlhf_rm_config, __VA_ARGS__)
#define TRAIN_ROW_PPO(kind, ...) TRAIN_FIELD_##kind(rlhf_ppo_config, __VA_ARGS__)
#define TRAIN_ROW_GEN(kind, ...) TRAIN_FIELD_##kind(rlhf_generate_config, __VA_ARGS__)
static const rlhf_field train_sft_fields[] = {RLHF_SFT_FIELDS(TRAIN_ROW_SFT)};
static const rlhf_field train_rm_fields[] = {RLHF_RM_FIELDS(TRAIN_ROW_RM)};
static const rlhf_field train_ppo_fields[] = {RLHF_PPO_FIELDS(TRAIN_ROW_PPO)};
static const rlhf_field train_gen_fields[] = {RLHF_GENERATE_FIELDS(TRAIN_ROW_GEN)};
#define TRAIN_ROW_EVAL(kind, ...) TRAIN_FIELD_##kind(rlhf_eval_config, __VA_ARGS__)
#define TRAIN_ROW_RATERS(kind, ...) TRAIN_FIELD_##kind(rlhf_raters_config, __VA_ARGS__)
static const rlhf_field train_eval_fields[] = {RLHF_EVAL_FIELDS(TRAIN_ROW_EVAL)};
static const rlhf_field train_raters_fields[] = {RLHF_RATERS_FIELDS(TRAIN_ROW_RATERS)};

static const struct {
    const rlhf_field *row;
    int n;
} train_tables[] = {
    [RLHF_CONFIG_SFT] = {train_sft_fields, sizeof train_sft_fields / sizeof *train_sft_fields},
    [RLHF_CONFIG_RM] = {train_rm_fields, sizeof train_rm_fields / sizeof *train_rm_fields},
    [RLHF_CONFIG_PPO] = {train_ppo_fields, sizeof train_ppo_fields / sizeof *train_ppo_fields},
    [RLHF_CONFIG_GENERATE] = {train_gen_fields, sizeof train_gen_fields / sizeof *train_gen_fields},
    [RLHF_CONFIG_EVAL] = {train_eval_fields, sizeof train_eval_fields / sizeof *train_eval_fields},
    [RLHF_CONFIG_RATERS] = {train_raters_fields,
                            sizeof train_raters_fields / sizeof *train_raters_fields}};

/* Writes the defaults of n fields into their struct. */
static void train_fill(const rlhf_field *f, int n, void *config) {
    for (const rlhf_field *end = f + n; f < end; f++) {
        char *at = (char *)config + f->offset;
        int64_t integer = (int64_t)f->def;
        int boolean = (int)f->def;
        switch (f->kind) {
        case 'I': memcpy(at, &integer, sizeof integer); break;
        case 'R': memcpy(at, &f->def, sizeof f->def); break;
        case 'B': memcpy(at, &boolean, sizeof boolean); break;
        default: memcpy(at, &f->text, sizeof f->text); break;
        }
    }
}

/* The same for a table. */
static void train_defaults(rlhf_config_kind kind, void *config) {
    train_fill(train_tables[kind].row, train_tables[kind].n, config);
}

/* A field's value, of kind I, R or B; integers in a configuration are exact as doubles (< 2^53). */
static double train_number(const rlhf_field *f, const void *config) {
    const char *at = (const char *)config + f->offset;
    int64_t integer;
    int boolean;
    double real;
    switch (f->kind) {
    case 'I': memcpy(&integer, at, sizeof integer); return (double)integer;
    case 'B': memcpy(&boolean, at, sizeof boolean); return boolean;
    default: memcpy(&real, at, sizeof real); return real;
    }
}

/* A field's value, of kind S; may be null. */
static const char *train_text(const rlhf_field *f, const void *config) {
    const char *s;
    memcpy(&s, (const char *)config + f->offset, sizeof s);
    return s;
}

/* Every value within the table's limits, or an error that names the field. */
static void train_validate(rlhf_ctx *ctx, rlhf_config_kind kind, const void *config) {
    for (int i = 0; i < train_tables[kind].n; i++) {
        const rlhf_field *f = train_tables[kind].row + i;
        if (f->kind == 'S') {
            const char *s = train_text(f, config);
            if (!s || (f->choices && !base_is_choice(f->choices, s)))
                err_throw(ctx, RLHF_ERR_ARG, "%s is \"%s\", expected one of %s", f->name,
                          s ? s : "(null)", f->choices ? f->choices : "any text");
            continue;
        }
        /* A NaN fails both comparisons. */
        double x = train_number(f, config);
        if (!(x >= f->min && x <= f->max))
            err_throw(ctx, RLHF_ERR_ARG, "%s is %g, expected %g to %g", f->name, x, f->min, f->max);
    }
}

/* The configuration as a held JSON object. */
static json_t *train_config_json(rlhf_ctx *ctx, rlhf_config_kind kind, const void *config) {
    json_t *j = json_hold(ctx, json_object());
    for (int i = 0; i < train_tables[kind].n; i++) {
        const rlhf_field *f = train_tables[kind].row + i;
        double x = f->kind == 'S' ? 0 : train_number(f, config);
        json_t *v = f->kind == 'S'   ? json_string(train_text(f, config))
                    : f->kind == 'B' ? json_boolean(x != 0)
                    : f->kind == 'I' ? json_integer((json_int_t)x)
                                     : json_real(x);
        json_object_set_new(j, f->name, v);
    }
    return j;
}

/* ---- trainer ---- */

/* One named number, the newest one of its kind. */
typedef struct train_metric {
    char name[40];
    double value;
    int fresh; /* put since the last line of metrics */
} train_metric;

/* A model that samples answers: so many at once, their longest prompt, their length with it. */
typedef struct train_sampler {
    const rlhf_model *m;
    int slots, prompt, len;
} train_sampler;

/* What of a run decides how much memory it takes; tokens, at most. */
typedef struct train_size {
    int rows;                /* of a micro-batch */
    int64_t step;            /* of an optimizer step */
    train_sampler sampler[2];
    int samplers;
    int after;               /* they sample after the last step, when its arena is given back */
    int compared;            /* tokens of the sequences whose logits are compared with another's */
    int64_t scored;          /* tokens of all that is scored in one go */
    size_t rollout;          /* bytes that stay in the arena for a whole step */
} train_size;

/* What is learned of annotators beside the model (29): a number for each, with its gradient and
 * both moments. n 0: nothing. */
typedef struct train_annotators {
    int n;
    const char **name;    /* the dataset's texts */
    int *of, *judgements; /* [records]: number of its annotator, -1: it has none; [n] */
    float *x, *g, *m, *v; /* [n] */
} train_annotators;

/* What makes a trainer: step computes one optimizer step or update, eval puts metrics over
 * t->eval. */
typedef struct train_ops {
    const char *name;
    rlhf_config_kind kind;
    void (*step)(rlhf_trainer *t);
    void (*begin)(rlhf_trainer *t);  /* before the first step of a run directory; may be null */
    void (*eval)(rlhf_trainer *t);   /* may be null */
    void (*finish)(rlhf_trainer *t); /* after the last step, before the model is saved; may be null
                                      */
    void (*size)(const rlhf_trainer *t, train_size *size);
} train_ops;

/* One run. Models, data and tokenizer are the host's unless owned; configuration texts are the
 * host's, too. */
struct rlhf_trainer {
    rlhf_ctx *ctx;
    const train_ops *ops;
    union {
        train_config c;
        rlhf_sft_config sft;
        rlhf_rm_config rm;
        rlhf_ppo_config ppo;
    } u;
    rlhf_model *model; /* what is trained and saved */
    rlhf_model *start; /* rm: samples answers to normalise with; ppo: the reference, owned */
    rlhf_model *value, *reward;
    int owns_start, owns_value;
    train_annotators who; /* rm */
    rlhf_tokenizer *tok;
    rlhf_dataset *train, *eval; /* eval may be null */
    rlhf_reward_fn fn;
    void *user;
    opt *opt;
    arena ws; /* of one step, evaluation or finish; empty between them */
    int64_t step, total, tokens, episodes;
    int64_t per_epoch;   /* steps */
    int *order;          /* [records], of the running epoch */
    int64_t order_epoch; /* of order; -1: none yet */
    double kl_coef, begun;
    int slot;            /* of checkpoint/a and checkpoint/b: where the next state goes */
    int fresh, finished; /* fresh: the run directory has not been opened yet */
    int at_once;      /* tokens of a micro-batch, unless its first sequence is longer */
    rlhf_memory memory; /* what the run takes, known when it is opened */
    int owed, logged; /* the last step's evaluation, line and checkpoint are still to be done, or in
                         part: what an error interrupted is made up for by the next call */
    train_metric metric[TRAIN_METRICS];
    int metrics;
    char events[192]; /* the event file's name in runs/; "" until there is one */
    int samples, sample_room, sample_stop; /* prompts of samples.jsonl, 0: there is none; tokens of
                                              an answer; the id that ends it, -1: the model's */
    json_t *about; /* further members of run.json, the host's; may be null */
};

/* Sets the newest value of a metric. */
static void train_put(rlhf_trainer *t, const char *name, double value) {
    int i = 0;
    while (i < t->metrics && strcmp(t->metric[i].name, name)) i++;
    if (i == TRAIN_METRICS) return;
    if (i == t->metrics) {
        snprintf(t->metric[i].name, sizeof t->metric[i].name, "%s", name);
        t->metrics++;
    }
    t->metric[i].value = value;
    t->metric[i].fresh = 1;
}

/* All newest metrics, or with `fresh` those put since the last line, held. A number that JSON
 * cannot express is null. */
static json_t *train_metrics_json(const rlhf_trainer *t, int fresh) {
    json_t *j = json_hold(t->ctx, json_object());
    json_object_set_new(j, "step", json_integer(t->step));
    for (int i = 0; i < t->metrics; i++) {
        if (fresh && !t->metric[i].fresh) continue;
        double v = t->metric[i].value;
        json_object_set_new(j, t->metric[i].name, isfinite(v) ? json_real(v) : json_null());
    }
    return j;
}

/* Seed of what the coming step drops. */
static uint64_t train_seed(const rlhf_trainer *t) {
    return rng_u64((uint64_t)t->u.c.seed, RNG_DROPOUT, (uint64_t)t->step);
}

/* Learning rate of the coming step. */
static double train_lr(const rlhf_trainer *t) {
    const train_config *c = &t->u.c;
    return c->learning_rate *
           opt_schedule(c->lr_scheduler_type, t->step, c->warmup_steps, t->total);
}

/* The records of the coming step: t->order[*from] and those behind it; returns their number. The
 * order is drawn anew each epoch; epochs end with a shorter step. */
static int train_window(rlhf_trainer *t, int *from) {
    const train_config *c = &t->u.c;
    int64_t epoch = t->step / t->per_epoch, at = t->step % t->per_epoch;
    int64_t window = c->per_device_train_batch_size * c->gradient_accumulation_steps;
    if (t->order_epoch != epoch) {
        data_order((uint64_t)c->seed, epoch, c->shuffle_dataset, t->train->n, t->order);
        t->order_epoch = epoch;
    }
    *from = (int)(at * window);
    int64_t left = t->train->n - at * window;
    return (int)(left < window ? left : window);
}

/* Settles what of a model is trained: the adapters it has, new ones if they are asked for, else all
 * of it. */
static void train_prepare(rlhf_model *m, const train_config *c, uint64_t seed) {
    if (!m->c.layers) return; /* a head alone */
    m->recompute = c->gradient_checkpointing;
    if (m->c.lora.r) {
        if (c->use_peft) m->c.lora.dropout = (float)c->lora_dropout;
        return;
    }
    if (!c->use_peft) {
        model_thaw(m);
        return;
    }
    if (!m->base)
        err_throw(m->ctx, RLHF_ERR_ARG,
                  "use_peft: an adapter needs a base that lies in a directory; save this model and "
                  "open it again");
    model_lora l = {.r = (int)c->lora_r,
                    .alpha = (float)c->lora_alpha,
                    .dropout = (float)c->lora_dropout,
                    .rslora = c->use_rslora};
    ckpt_targets(m, "lora_target_modules", c->lora_target_modules, &l);
    model_adapt(m, &l, seed);
}

/* How many of the sequences (pairs) from `from` on make the next micro-batch: what does not fit at
 * once changes nothing but memory, since gradients are chains over rows in order. */
static int train_cut(const rlhf_trainer *t, const int *len, int from, int n) {
    int64_t most = t->u.c.per_device_train_batch_size;
    return model_cut(len, from, n - from > most ? from + (int)most : n, t->at_once);
}

/* Makes the optimizer of n models from the common configuration. */
static void train_optimizer(rlhf_trainer *t, rlhf_model *const *models, int n) {
    const train_config *c = &t->u.c;
    for (int i = 0; i < n; i++) train_prepare(models[i], c, (uint64_t)c->seed + (uint64_t)i);
    t->opt = opt_new(t->ctx, models, n);
    t->opt->beta1 = c->adam_beta1;
    t->opt->beta2 = c->adam_beta2;
    t->opt->eps = c->adam_epsilon;
    t->opt->weight_decay = c->weight_decay;
    t->opt->max_norm = c->max_grad_norm;
}

/* What a step would find too late: records that the model has no positions or no tokens for. */
static void train_check_records(const rlhf_model *m, const rlhf_dataset *d) {
    for (int i = 0; i < d->n; i++) {
        const data_seq *pair[2] = {&d->record[i].a, &d->record[i].b};
        for (int k = 0; k < 2; k++) {
            if (pair[k]->n > m->c.positions)
                err_throw(
                    m->ctx, RLHF_ERR_CONTEXT,
                    "record %d has %d tokens: the model has %d positions (a smaller max_length "
                    "drops such records)",
                    i, pair[k]->n, m->c.positions);
            for (int t = 0; t < pair[k]->n; t++)
                if (pair[k]->ids[t] < 0 || pair[k]->ids[t] >= m->c.vocab)
                    err_throw(m->ctx, RLHF_ERR_ARG,
                              "record %d: token id %d is not below the vocabulary size %d (is this "
                              "the model's tokenizer?)",
                              i, (int)pair[k]->ids[t], m->c.vocab);
        }
    }
}

/* A trainer whose config is size bytes (copied); checks it, and that every record fits the model.
 * The caller sets the length of the run and the optimizer. */
static rlhf_trainer *train_new(rlhf_model *model, rlhf_tokenizer *tok, rlhf_dataset *train,
                               const train_ops *ops, const void *config, size_t size) {
    rlhf_ctx *ctx = model->ctx;
    train_validate(ctx, ops->kind, config);
    train_check_records(model, train);
    rlhf_trainer *t = mem_zalloc(ctx, 1, sizeof *t);
    t->ctx = ctx;
    t->ops = ops;
    memcpy(&t->u, config, size);
    t->model = model;
    t->tok = tok;
    t->train = train;
    t->ws.ctx = ctx;
    t->order = mem_zalloc(ctx, (size_t)train->n, sizeof *t->order);
    t->order_epoch = -1;
    t->fresh = 1;
    t->begun = base_now();
    return t;
}

/* Length of the run when a step takes `window` records. Part of an epoch counts up to a whole
 * step. */
static void train_set_length(rlhf_trainer *t, int64_t window) {
    const train_config *c = &t->u.c;
    t->per_epoch = (t->train->n + window - 1) / window;
    t->total = c->max_steps >= 0 ? c->max_steps
                                 : (int64_t)ceil(c->num_train_epochs * (double)t->per_epoch);
}

/* ---- memory ---- */

enum {
    TRAIN_SLOTS = 64,        /* answers sampled at once */
    TRAIN_PROGRAM = 5 << 20  /* bytes of program and libraries, about */
};

/* Tokens of a micro-batch where memory is no concern: products of more rows are hardly faster, with
 * many threads from more rows on. */
static int train_at_once(const rlhf_ctx *ctx) {
    return base_max(320, base_min(512, 64 * ctx->threads));
}

/* Bytes mapped of a role's base, unless a role before it has the same. */
static int64_t train_mapped(rlhf_model *const *role, int i) {
    const model_base *b = role[i] ? role[i]->base : NULL;
    int64_t bytes = 0;
    for (int k = 0; k < i; k++)
        if (role[k] && role[k]->base == b) return 0;
    for (int k = 0; b && k < b->n_maps; k++) bytes += (int64_t)b->maps[k]->size;
    return bytes;
}

/* Tokens of a sequence before its first one that bears loss: the prompt. */
static int train_prompt(const data_seq *s) {
    int n = 0;
    while (n < s->n && !s->loss[n]) n++;
    return n;
}

/* The longest prompt of the training data. */
static int train_longest_prompt(const rlhf_trainer *t) {
    const rlhf_dataset *d = t->train;
    int longest = 0;
    for (int i = 0; i < d->n; i++) {
        const data_seq *s = &d->record[i].a;
        int n = d->config.kind == RLHF_DATA_PROMPT ? s->n : train_prompt(s);
        longest = base_max(longest, n);
    }
    return longest;
}

/* Adds a sampler of answers to the training data's prompts. */
static void train_add_sampler(const rlhf_trainer *t, train_size *z, const rlhf_model *m, int slots,
                              int room) {
    int prompt = base_max(train_longest_prompt(t), 1);
    z->sampler[z->samplers++] = (train_sampler){m, slots, prompt, prompt + room};
}

/* Tokens of the largest micro-batch and step of the run's first epochs, from the records in their
 * orders. */
static void train_record_size(const rlhf_trainer *t, train_size *z) {
    const train_config *c = &t->u.c;
    int64_t window = c->per_device_train_batch_size * c->gradient_accumulation_steps;
    int n = t->train->n, *order = mem_alloc(t->ctx, 2 * (size_t)n * sizeof *order);
    int *len = order + n;
    for (int64_t epoch = 0; epoch < 3 && epoch * t->per_epoch < t->total; epoch++) {
        data_order((uint64_t)c->seed, epoch, c->shuffle_dataset, n, order);
        for (int i = 0; i < n; i++)
            len[i] = t->train->record[order[i]].a.n + t->train->record[order[i]].b.n;
        int64_t steps = t->total - epoch * t->per_epoch, step = 0;
        for (int i = 0, k; i < n && i / window < steps; i += k) {
            int64_t end = (i / window + 1) * window;
            k = train_cut(t, len, i, end < n ? (int)end : n);
            int rows = 0;
            for (int j = i; j < i + k; j++) rows += len[j];
            z->rows = base_max(z->rows, rows);
            step = (i % window ? step : 0) + rows;
            if (step > z->step) z->step = step;
        }
    }
    mem_free(order);
}

/* The larger of two stages. */
static model_need train_larger(model_need a, model_need b) {
    return b.acts + b.cache + b.scratch > a.acts + a.cache + a.scratch ? b : a;
}

/* Bytes of panels that outlive a stage: those of the bases of what is trained on few rows at once
 * and, if sampling, of what samples; of a sampler's own matrices, too, unless the optimizer's
 * gradients lend the memory. */
static size_t train_panels(const rlhf_trainer *t, const train_size *z, int sampling) {
    const rlhf_model *few[2 + OPT_MODELS] = {0};
    int n = 0, trained;
    size_t bytes = 0;
    for (int i = 0; i < t->opt->models && z->rows < MODEL_MANY_ROWS; i++)
        few[n++] = t->opt->model[i];
    for (trained = n; sampling && n < trained + z->samplers; n++)
        few[n] = z->sampler[n - trained].m;
    for (int i = 0; i < n; i++) {
        int own = i >= trained, base = 1;
        for (int k = 0; k < t->opt->models; k++) own &= t->opt->model[k] != few[i];
        for (int k = 0; k < i; k++) base &= few[k]->base != few[i]->base;
        if (own) bytes += model_panel_bytes(few[i], 0);
        if (base) bytes += model_panel_bytes(few[i], 1);
    }
    return bytes;
}

/* The stage of a step that takes the most: sampling, scoring, or training. */
static model_need train_stage(const rlhf_trainer *t, const train_size *z) {
    model_need most = {0, 0, 0};
    /* What else there is by then. */
    size_t later = z->after ? train_panels(t, z, 1) - train_panels(t, z, 0) : 0;
    for (int i = 0; i < t->opt->models; i++)
        most = train_larger(most, model_need_training(t->opt->model[i], z->rows));
    for (const train_sampler *s = z->sampler; s < z->sampler + z->samplers; s++) {
        model_need sampling = model_need_sampling(s->m, s->slots, s->prompt, s->len);
        sampling.scratch += later;
        most = train_larger(most, sampling);
    }
    int batch = model_batch_tokens(t->model);
    if (z->compared)
        most = train_larger(most, model_need_scoring(t->model, base_min(z->compared, batch), 1));
    if (z->scored < batch) batch = (int)z->scored;
    model_need scoring = model_need_scoring(t->model, batch, 0);
    scoring.scratch += later;
    return train_larger(most, scoring);
}

/* What the run takes with the present at_once and recompute. */
static rlhf_memory train_memory(const rlhf_trainer *t) {
    rlhf_model *role[] = {t->model, t->value, t->start, t->reward};
    rlhf_memory o = {0};
    train_size z = {0};
    t->ops->size(t, &z);
    if (t->samples && t->tok && t->u.c.output_dir[0])
        train_add_sampler(t, &z, t->model,
                          base_min(base_min(t->samples, TRAIN_SLOTS),
                                   t->eval ? t->eval->n : t->train->n),
                          t->sample_room);
    for (int i = 0; i < 4; i++) {
        if (!role[i]) continue;
        *(role[i]->c.lora.r ? &o.adapters : &o.weights) += 4 * (int64_t)role[i]->n;
        o.weights += train_mapped(role, i);
        o.other -= 4 * (int64_t)role[i]->n;
    }
    for (int i = 0; i < t->opt->models; i++) {
        const model_cfg *c = &t->opt->model[i]->c;
        size_t met = z.step < c->vocab ? (size_t)z.step : (size_t)c->vocab;
        o.optimizer += 12 * (int64_t)t->opt->model[i]->n;
        o.other -= 12 * (int64_t)t->opt->model[i]->n;
        if (t->opt->embed[i]) o.optimizer += (int64_t)op_sparse_bytes(met, c->d);
    }
    o.other += t->ctx->mem_now + TRAIN_PROGRAM;
    model_need most = train_stage(t, &z);
    o.activations = (int64_t)(most.acts + z.rollout);
    o.cache = (int64_t)most.cache;
    o.scratch = (int64_t)most.scratch;
    o.scratch += (int64_t)train_panels(t, &z, !z.after);
    o.total = o.weights + o.adapters + o.optimizer + o.activations + o.cache + o.scratch + o.other;
    return o;
}

/* Chooses what a micro-batch is, and whether layers are computed again, so that the run fits
 * memory_limit; neither changes a bit of the result. Throws if nothing fits, and says what
 * would help. */
static void train_plan(rlhf_trainer *t) {
    const train_config *c = &t->u.c;
    double limit = c->memory_limit * 1e9;
    t->at_once = train_at_once(t->ctx);
    t->memory = train_memory(t);
    for (int again = 0; again < 2 && limit > 0; again++) {
        if (again && c->gradient_checkpointing) break;
        for (int i = 0; again && i < t->opt->models; i++) t->opt->model[i]->recompute = 1;
        for (t->at_once = train_at_once(t->ctx); t->at_once; t->at_once /= 2) {
            t->memory = train_memory(t);
            if ((double)t->memory.total <= limit) return;
        }
    }
    if (limit <= 0) return;
    t->at_once = 1;
    const rlhf_memory *o = &t->memory;
    err_throw(t->ctx, RLHF_ERR_ARG,
              "memory_limit is %g GB, the run takes %.2f GB at least: weights %.2f, adapters %.2f, "
              "optimizer %.2f, activations %.2f, cache %.2f, scratch %.2f, other %.2f; %s",
              c->memory_limit, (double)o->total / 1e9, (double)o->weights / 1e9,
              (double)o->adapters / 1e9, (double)o->optimizer / 1e9, (double)o->activations / 1e9,
              (double)o->cache / 1e9, (double)o->scratch / 1e9, (double)o->other / 1e9,
              c->use_peft ? "shorter records (max_length, response_length) or fewer episodes take "
                            "less"
                          : "use_peft trains an adapter on weights that stay as they are stored");
}

/* Gives the trainer and what it owns back; the trained model stays. */
static void train_free(rlhf_trainer *t) {
    opt_free(t->opt);
    arena_free(&t->ws);
    if (t->owns_start) model_free(t->start);
    if (t->owns_value) model_free(t->value);
    mem_free(t->who.name);
    mem_free(t->who.of);
    mem_free(t->who.x);
    mem_free(t->order);
    mem_free(t);
}

/* ============================================================================================
 * MARK: - 27 RUN (train_)
 * The loop that every trainer runs in: metrics, evaluation, checkpoints, resume. metrics.jsonl
 * holds no times, so that two equal runs write equal files.
 *
 * An optimizer step changes the weights whole or not at all: whatever may fail, fails before it.
 * What follows a step (evaluation, line, checkpoint) is owed until it is done. A run directory
 * holds
 *     run.json                          the configuration, without "resume"
 *     metrics.jsonl                     a line every logging_steps and for every evaluation
 *     runs/events.out.tfevents.*        the same for TensorBoard, with times; a file for each start
 *     samples.jsonl                     answers to a few prompts, before and after (sft, ppo)
 *     best_of_n.json                    what choosing the best of n answers reaches (ppo)
 *     checkpoint/trainer_state.json     where the run stands, and which of a and b counts
 *     checkpoint/a, checkpoint/b        weights and optimizer, written in turn
 *     config.json, model.safetensors    and the tokenizer's files: the model, in the end
 *     annotators.json                   rm, annotator_temperatures: what was found, in the end
 *
 * Entry: train_step, train_run.
 * Invariant: a resumed run writes the bytes of one that was never stopped, but for runs/.
 * Tests: test/test_train.c
 * ============================================================================================ */

/* ---- run directory ---- */

/* The run directory, or null: nothing is written. */
static const char *train_dir(const rlhf_trainer *t) {
    return t->u.c.output_dir[0] ? t->u.c.output_dir : NULL;
}

/* Both moments of each model as tensors [n], for writing or reading: list[2 * models]. */
static void train_state_tensors(const rlhf_trainer *t, ckpt_tensor *list) {
    for (int i = 0; i < t->opt->models; i++) {
        ckpt_tensor *x = list + 2 * i;
        snprintf(x[0].name, sizeof x[0].name, "exp_avg.%d", i);
        snprintf(x[1].name, sizeof x[1].name, "exp_avg_sq.%d", i);
        x[0].rows = x[1].rows = t->opt->model[i]->n;
        x[0].kind = x[1].kind = '4';
        x[0].data = t->opt->m[i];
        x[1].data = t->opt->v[i];
    }
}

/* The members that annotators.json holds for each annotator, and where. */
static const char *const train_who_keys[] = {"log_sharpness", "exp_avg", "exp_avg_sq"};
static float *train_who_at(const rlhf_trainer *t, int key, int i) {
    float *const list[] = {t->who.x, t->who.m, t->who.v};
    return list[key] + i;
}

/* Writes what is known of annotators into dir: 17 digits give every float back. */
static void train_save_who(const rlhf_trainer *t, const char *dir) {
    json_t *j = json_hold(t->ctx, json_object());
    for (int i = 0; i < t->who.n; i++) {
        json_t *one = json_object();
        for (int k = 0; k < 3; k++)
            json_object_set_new(one, train_who_keys[k], json_real((double)*train_who_at(t, k, i)));
        json_object_set_new(j, t->who.name[i], one);
    }
    json_write_file(t->ctx, ckpt_path(t->ctx, dir, "annotators.json"), j);
    err_release(t->ctx);
}

/* Reads it back; every annotator of the training data must be there. */
static void train_load_who(rlhf_trainer *t, const char *dir) {
    json_src src = json_source(t->ctx, ckpt_path(t->ctx, dir, "annotators.json"));
    json_t *j = json_read(&src);
    for (int i = 0; i < t->who.n; i++) {
        const json_t *one = json_need_object(&src, j, t->who.name[i]);
        for (int k = 0; k < 3; k++)
            *train_who_at(t, k, i) = (float)json_need_real(&src, one, train_who_keys[k]);
    }
    err_release(t->ctx);
}

/* Writes checkpoint/a or b, in turn: the weights, the optimizer and where the run stands. The state
 * file comes last and names the directory: until then the other one, still whole, counts. */
static void train_save_state(rlhf_trainer *t) {
    rlhf_ctx *ctx = t->ctx;
    char *top = ckpt_path(ctx, train_dir(t), "checkpoint");
    char *dir = ckpt_path(ctx, top, t->slot ? "b" : "a");
    ckpt_save(t->model, dir, '4'); /* every digit, whatever the run ends in */
    if (t->owns_value) ckpt_save(t->value, ckpt_path(ctx, dir, "value"), '4');
    if (t->who.n) train_save_who(t, dir);
    ckpt_tensor list[2 * OPT_MODELS] = {0};
    train_state_tensors(t, list);
    ckpt_write(ctx, ckpt_path(ctx, dir, "optimizer.safetensors"), list, 2 * t->opt->models);
    /* Numbers that are not functions of the others, and what a resumed run is checked against. */
    json_t *j = json_hold(ctx, json_object());
    json_object_set_new(j, "trainer", json_string(t->ops->name));
    json_object_set_new(j, "step", json_integer(t->step));
    json_object_set_new(j, "optimizer_step", json_integer(t->opt->step));
    json_object_set_new(j, "tokens", json_integer(t->tokens));
    json_object_set_new(j, "episodes", json_integer(t->episodes));
    json_object_set_new(j, "kl_coef", json_real(t->kl_coef));
    json_object_set_new(j, "records", json_integer(t->train->n));
    json_object_set_new(j, "score_mean", json_real((double)t->model->score_mean));
    json_object_set_new(j, "score_std", json_real((double)t->model->score_std));
    json_object_set_new(j, "dtype", json_string(ctx->half ? "bf16" : "f32"));
    json_object_set_new(j, "slot", json_string(t->slot ? "b" : "a"));
    json_write_file(ctx, ckpt_path(ctx, top, "trainer_state.json"), j);
    err_release(ctx);
    t->slot = !t->slot;
}

/* Takes the run to where the state file says; it must be of this trainer and this number of
 * records. Orders and samples need no state: they are functions of seed, step and episode. */
static void train_load_state(rlhf_trainer *t) {
    rlhf_ctx *ctx = t->ctx;
    char *top = ckpt_path(ctx, train_dir(t), "checkpoint");
    json_src src = json_source(ctx, ckpt_path(ctx, top, "trainer_state.json"));
    json_t *j = json_read(&src);
    const char *name = json_need_str(&src, j, "trainer");
    if (strcmp(name, t->ops->name) || json_need_int(&src, j, "records", 0, INT_MAX) != t->train->n)
        err_throw(ctx, RLHF_ERR_ARG,
                  "%s: the state is of another run (%s, another number of records)", src.file,
                  name);
    const char *dtype = json_opt_str(&src, j, "dtype", "f32");
    if (strcmp(dtype, ctx->half ? "bf16" : "f32"))
        err_throw(ctx, RLHF_ERR_ARG, "%s: the run was begun with dtype %s; go on with the same",
                  src.file, dtype);
    /* All of the file is read before any of it counts. */
    const int64_t most = (int64_t)1 << 53;
    int64_t step = json_need_int(&src, j, "step", 0, most);
    int64_t opt_step = json_need_int(&src, j, "optimizer_step", 0, most);
    int64_t tokens = json_need_int(&src, j, "tokens", 0, most);
    int64_t episodes = json_need_int(&src, j, "episodes", 0, most);
    double kl_coef = json_need_real(&src, j, "kl_coef");
    double mean = json_need_real(&src, j, "score_mean"), std = json_need_real(&src, j, "score_std");
    int slot = strcmp(json_need_str(&src, j, "slot"), "b") != 0;
    char *dir = ckpt_path(ctx, top, slot ? "a" : "b");
    err_release(ctx);
    ckpt_restore(t->model, dir);
    if (t->owns_value) ckpt_restore(t->value, ckpt_path(ctx, dir, "value"));
    if (t->who.n) train_load_who(t, dir);
    /* Moments are read into the optimizer's own arrays. */
    ckpt_file f = ckpt_map(ctx, ckpt_path(ctx, dir, "optimizer.safetensors"));
    ckpt_tensor list[2 * OPT_MODELS] = {0};
    train_state_tensors(t, list);
    for (int i = 0; i < 2 * t->opt->models; i++) {
        json_t *entry = json_object_get(f.header, list[i].name);
        if (!entry)
            err_throw(ctx, RLHF_ERR_FORMAT, "%s: tensor \"%s\" is missing", f.src.file,
                      list[i].name);
        ckpt_load(&f, entry, list + i);
    }
    err_release(ctx);
    err_release(ctx);
    t->step = step;
    t->opt->step = opt_step;
    t->tokens = tokens;
    t->episodes = episodes;
    t->kl_coef = kl_coef;
    t->slot = slot;
    t->model->score_mean = (float)mean;
    t->model->score_std = (float)std;
}

/* Appends to out the whole lines of a file of JSON lines up to the first one of a step above
 * `last`, or cut short by a crash. A file that is not there has none. */
static void train_keep_lines(rlhf_trainer *t, const char *path, int64_t last, tok_buf *out) {
    if (!io_exists(path)) return;
    size_t len, keep = 0;
    char *text = io_read(t->ctx, path, IO_LIMIT, &len);
    /* keep: bytes of whole lines up to that step. */
    while (keep < len) {
        char *end = memchr(text + keep, '\n', len - keep);
        json_error_t e;
        json_t *j = end ? json_loadb(text + keep, (size_t)(end - text) - keep, 0, &e) : NULL;
        int64_t step = json_integer_value(json_object_get(j, "step"));
        json_decref(j);
        if (!j || step > last) break;
        keep = (size_t)(end - text) + 1;
    }
    tok_put(out, text, keep);
    mem_free(text);
}

/* Keeps the lines of metrics.jsonl up to the step that the run goes on from; later ones are written
 * again. */
static void train_trim_metrics(rlhf_trainer *t, const char *path) {
    if (!io_exists(path)) return;
    tok_buf text = {.ctx = t->ctx};
    tok_put(&text, "", 0);
    train_keep_lines(t, path, t->step, &text);
    io_write_file(t->ctx, path, text.p, text.n);
    mem_free(text.p);
}

/* ---- TensorBoard ---- */

/* An event file is a list of records: the length in 8 bytes, a checksum of those, the data, a
 * checksum of it. The data are a message in protocol buffers' wire format: fields as number << 3 |
 * kind, then the value. Only these kinds of values occur. */
enum { TRAIN_WIRE_INT = 0, TRAIN_WIRE_DOUBLE = 1, TRAIN_WIRE_BYTES = 2, TRAIN_WIRE_FLOAT = 5 };

/* Fields of an Event, of the Summary in it, and of one of its values. */
enum { TRAIN_EVENT_TIME = 1, TRAIN_EVENT_STEP, TRAIN_EVENT_VERSION, TRAIN_EVENT_SUMMARY = 5 };
enum { TRAIN_EVENT_SESSION = 7, TRAIN_SUMMARY_VALUE = 1, TRAIN_VALUE_TAG = 1, TRAIN_VALUE_SIMPLE };

/* CRC-32C (Castagnoli), rotated and offset as the format wants it, so that a checksum of data that
 * hold checksums is no special number. A line of metrics has a few hundred bytes: no table. */
static uint32_t train_crc(const void *data, size_t n) {
    const unsigned char *p = data;
    uint32_t c = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++) c = c >> 1 ^ (c & 1 ? 0x82f63b78 : 0);
    }
    c = ~c;
    return (c >> 15 | c << 17) + 0xa282ead8;
}

/* A field of kind TRAIN_WIRE_INT; field 0: the bare number. */
static void train_wire_int(tok_buf *b, int field, uint64_t v) {
    if (field) train_wire_int(b, 0, (uint64_t)field << 3 | TRAIN_WIRE_INT);
    for (; v > 127; v >>= 7) tok_put(b, (const char[]){(char)(v | 128)}, 1);
    tok_put(b, (const char[]){(char)v}, 1);
}

/* A field whose value lies in n bytes; those of kind TRAIN_WIRE_BYTES are preceded by their
 * number. */
static void train_wire(tok_buf *b, int field, int kind, const void *data, size_t n) {
    train_wire_int(b, 0, (uint64_t)field << 3 | (uint64_t)kind);
    if (kind == TRAIN_WIRE_BYTES) train_wire_int(b, 0, n);
    tok_put(b, data, n);
}

/* The value of one metric, in the summary. Names are grouped as transformers does it: eval_loss is
 * eval/loss, everything else stands under train/. */
static void train_wire_metric(tok_buf *summary, const train_metric *metric) {
    char tag[64];
    int eval = !strncmp(metric->name, "eval_", 5);
    snprintf(tag, sizeof tag, "%s%s", eval ? "eval/" : "train/", metric->name + 5 * eval);
    float number = (float)metric->value;
    tok_buf value = {summary->ctx, NULL, 0, 0};
    train_wire(&value, TRAIN_VALUE_TAG, TRAIN_WIRE_BYTES, tag, strlen(tag));
    train_wire(&value, TRAIN_VALUE_SIMPLE, TRAIN_WIRE_FLOAT, &number, sizeof number);
    train_wire(summary, TRAIN_SUMMARY_VALUE, TRAIN_WIRE_BYTES, value.p, value.n);
    mem_free(value.p);
}

/* Appends a record: an event of this moment and a step with one more field. */
static void train_put_event(const rlhf_trainer *t, FILE *f, int64_t step, int field,
                            const void *data, size_t n) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    double now = (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
    tok_buf event = {t->ctx, NULL, 0, 0}, record = event;
    train_wire(&event, TRAIN_EVENT_TIME, TRAIN_WIRE_DOUBLE, &now, sizeof now);
    train_wire_int(&event, TRAIN_EVENT_STEP, (uint64_t)step);
    train_wire(&event, field, TRAIN_WIRE_BYTES, data, n);
    uint64_t size = event.n;
    uint32_t head = train_crc(&size, sizeof size), body = train_crc(event.p, event.n);
    tok_put(&record, (const char *)&size, sizeof size);
    tok_put(&record, (const char *)&head, sizeof head);
    tok_put(&record, event.p, event.n);
    tok_put(&record, (const char *)&body, sizeof body);
    if (fwrite(record.p, 1, record.n, f) != record.n || fflush(f))
        io_fail(t->ctx, "write", ckpt_path(t->ctx, train_dir(t), "runs"), errno);
    mem_free(record.p);
    mem_free(event.p);
}

/* For err_defer; what was flushed is safe from errors of closing. */
static void train_close_file(void *file) { fclose(file); }

/* The event file of this start, deferred until err_release. The first time it gets a name that no
 * other has, the format's version, and the mark of a start, at which TensorBoard drops what earlier
 * starts wrote of the coming steps. */
static FILE *train_open_events(rlhf_trainer *t) {
    rlhf_ctx *ctx = t->ctx;
    char *dir = ckpt_path(ctx, train_dir(t), "runs"), host[65] = "localhost", name[192];
    int fresh = !t->events[0];
    FILE *f = NULL;
    if (fresh) io_mkdirs(ctx, dir);
    if (fresh && gethostname(host, sizeof host - 1) != 0) snprintf(host, sizeof host, "localhost");
    for (int i = 0; fresh && !f; i++) {
        snprintf(name, sizeof name, "events.out.tfevents.%010lld.%s.%ld.%d", (long long)time(NULL),
                 host, (long)getpid(), i);
        f = fopen(ckpt_path(ctx, dir, name), "wbx");
        if (!f && errno != EEXIST) io_fail(ctx, "write", ckpt_path(ctx, dir, name), errno);
    }
    if (!fresh) f = fopen(ckpt_path(ctx, dir, t->events), "ab");
    if (!f) io_fail(ctx, "write", ckpt_path(ctx, dir, t->events), errno);
    err_defer(ctx, train_close_file, f);
    if (!fresh) return f;
    static const char start[] = {TRAIN_WIRE_INT | 1 << 3, 1}; /* a SessionLog: status START */
    train_put_event(t, f, 0, TRAIN_EVENT_VERSION, "brain.Event:2", 13);
    train_put_event(t, f, t->step + 1, TRAIN_EVENT_SESSION, start, sizeof start);
    memcpy(t->events, name, sizeof name);
    return f;
}

/* One event with the metrics put since the last line. */
static void train_log_events(rlhf_trainer *t) {
    FILE *f = train_open_events(t);
    tok_buf summary = {t->ctx, NULL, 0, 0};
    for (int i = 0; i < t->metrics; i++)
        if (t->metric[i].fresh) train_wire_metric(&summary, t->metric + i);
    if (summary.n) train_put_event(t, f, t->step, TRAIN_EVENT_SUMMARY, summary.p, summary.n);
    mem_free(summary.p);
    err_release(t->ctx);
}

/* ---- samples ---- */

/* Up to `most` prompts that differ, in ws, as items without key and with room for their answers.
 * They are spread evenly over the evaluation set, else over the training set, whatever the seed, so
 * that runs on the same file show the same prompts. A text without a prompt gives its beginning. */
static gen_item *train_sample_prompts(rlhf_trainer *t, int most, int room, int *count) {
    const rlhf_dataset *d = t->eval ? t->eval : t->train;
    gen_item *item = arena_alloc(&t->ws, (size_t)(most + 1) * sizeof *item);
    int n = 0;
    for (int i = 0, next = 0; i < most; i++) {
        int same = 1, at = base_max(next, (int)((int64_t)i * d->n / most));
        for (; same && at < d->n; at++) {
            const data_seq *s = &d->record[at].a;
            int prompt = d->config.kind == RLHF_DATA_PROMPT ? s->n : train_prompt(s);
            if (prompt < 2) prompt = base_max(base_min(8, s->n / 2), 1);
            same = prompt >= t->model->c.positions;
            for (int k = 0; k < n && !same; k++)
                same = item[k].n_prompt == prompt &&
                       !memcmp(item[k].prompt, s->ids, (size_t)prompt * sizeof *s->ids);
            if (same) continue;
            int32_t *whole = arena_alloc(&t->ws, (size_t)(prompt + room) * sizeof *whole);
            memcpy(whole, s->ids, (size_t)prompt * sizeof *whole);
            item[n++] = (gen_item){.prompt = whole, .n_prompt = prompt, .out = whole + prompt};
        }
        next = at;
    }
    *count = n;
    return item;
}

/* Raw scores of n items, prompt and answer, which lie in one piece. */
static float *train_score_items(rlhf_trainer *t, const gen_item *item, int n) {
    const int32_t **ids = arena_alloc(&t->ws, (size_t)(n + 1) * sizeof *ids);
    int *len = arena_alloc(&t->ws, (size_t)(n + 1) * sizeof *len);
    float *score = arena_floats(&t->ws, (size_t)n, 1);
    for (int i = 0; i < n; i++) {
        ids[i] = item[i].prompt;
        len[i] = item[i].n_prompt + item[i].n;
    }
    model_score_list(t->reward, &t->ws, n, ids, len, score);
    return score;
}

/* Answers of the model that is trained, between its steps. */
static void train_generate(rlhf_trainer *t, const gen_config *c, gen_item *item, int n) {
    opt_lend(t->opt);
    gen_run(t->model, &t->ws, c, item, n, NULL);
}

/* The most likely answers (greedy, whatever the temperature of training) of the model as it is, a
 * line each, put into samples.jsonl in place of those of this step and later ones; where there is a
 * reward model, with its score. */
static void train_sample(rlhf_trainer *t) {
    rlhf_ctx *ctx = t->ctx;
    if (!t->samples || !t->tok || !train_dir(t)) return;
    arena_reset(&t->ws);
    int n;
    gen_item *item = train_sample_prompts(t, t->samples, t->sample_room, &n);
    gen_config g = {.max_new = t->sample_room,
                    .batch = TRAIN_SLOTS,
                    .top_p = 1,
                    .stop = t->sample_stop};
    train_generate(t, &g, item, n);
    float *score = t->reward ? train_score_items(t, item, n) : NULL;
    char *path = ckpt_path(ctx, train_dir(t), "samples.jsonl");
    tok_buf text = {.ctx = ctx};
    tok_put(&text, "", 0);
    train_keep_lines(t, path, t->step - 1, &text);
    for (int i = 0; i < n; i++) {
        char *prompt = gen_text(t->tok, item[i].prompt, item[i].n_prompt);
        char *answer = gen_text(t->tok, item[i].out, item[i].n);
        json_t *j = json_hold(ctx, json_pack("{s:I,s:s,s:s,s:i,s:b}", "step", (json_int_t)t->step,
                                             "prompt", prompt, "completion", answer, "n_tokens",
                                             item[i].n, "finished", item[i].finished));
        if (score)
            json_object_set_new(j, "score", json_real((double)model_reward(t->reward, score[i])));
        size_t len;
        char *line = json_text(ctx, j, JSON_COMPACT, &len);
        tok_put(&text, line, len);
        tok_put(&text, "\n", 1);
        err_release(ctx);
        mem_free(line);
        mem_free(answer);
        mem_free(prompt);
    }
    io_write_file(ctx, path, text.p, text.n);
    mem_free(text.p);
}

/* ---- opening and logging ---- */

/* First contact with the run directory: its configuration, an empty metrics.jsonl, or the state to
 * go on from. If it fails, the next step tries again. */
static void train_open_dir(rlhf_trainer *t) {
    if (!train_dir(t)) {
        t->fresh = 0;
        return;
    }
    rlhf_ctx *ctx = t->ctx;
    io_mkdirs(ctx, train_dir(t));
    char *metrics = ckpt_path(ctx, train_dir(t), "metrics.jsonl");
    char *state = ckpt_path(ctx, ckpt_path(ctx, train_dir(t), "checkpoint"), "trainer_state.json");
    if (t->u.c.resume && io_exists(state)) {
        train_load_state(t);
        train_trim_metrics(t, metrics);
        log_at(ctx, RLHF_LOG_INFO, "%s: going on from step %lld", train_dir(t), (long long)t->step);
    } else {
        if (t->u.c.resume)
            log_at(ctx, RLHF_LOG_WARNING, "%s: no state to go on from; starting at step 0",
                   train_dir(t));
        unlink(state); /* it would belong to an earlier run, as would these */
        unlink(ckpt_path(ctx, train_dir(t), "samples.jsonl"));
        unlink(ckpt_path(ctx, train_dir(t), "best_of_n.json"));
        unlink(ckpt_path(ctx, train_dir(t), "eval.json"));
        io_write_file(ctx, metrics, "", 0);
    }
    /* The configuration of this start; a resumed run may have raised max_steps. */
    json_t *j = train_config_json(ctx, t->ops->kind, &t->u);
    json_object_del(j, "resume");
    json_object_set_new(j, "trainer", json_string(t->ops->name));
    json_object_set_new(j, "dtype", json_string(ctx->half ? "bf16" : "f32"));
    json_object_set_new(j, "rlhf_version", json_string(RLHF_VERSION));
    if (t->about) json_object_update(j, t->about);
    json_write_file(ctx, ckpt_path(ctx, train_dir(t), "run.json"), j);
    err_release(ctx);
    if (!t->step) {
        train_sample(t);
        if (t->ops->begin) t->ops->begin(t);
    }
    (void)train_open_events(t);
    err_release(ctx);
    t->fresh = 0;
}

/* One line of metrics, if `line`, for the file and the progress hook, which is called after every
 * step. Returns 0 if the hook asks to stop. The file is opened for each line: a run of days holds
 * no handle, and each line is on its way when the step is over. */
static int train_log(rlhf_trainer *t, int line) {
    rlhf_ctx *ctx = t->ctx;
    char *text = NULL;
    size_t len = 0;
    if (line) {
        text = json_text(ctx, train_metrics_json(t, 1), JSON_COMPACT, &len);
        err_release(ctx);
    }
    if (line && train_dir(t)) {
        train_log_events(t); /* before the line, which must not be written twice */
        char *path = ckpt_path(ctx, train_dir(t), "metrics.jsonl");
        FILE *f = fopen(path, "ab");
        if (!f) io_fail(ctx, "open", path, errno);
        err_defer(ctx, train_close_file, f);
        if (fwrite(text, 1, len, f) != len || fputc('\n', f) == EOF || fflush(f))
            io_fail(ctx, "write", path, errno);
        err_release(ctx);
    }
    for (int i = 0; line && i < t->metrics; i++) t->metric[i].fresh = 0;
    /* Without a line the hook still learns how far the run is. */
    int stop = 0;
    if (ctx->hooks.progress) {
        rlhf_progress p = {t->ops->name, t->step, t->total, t->tokens, base_now() - t->begun, text};
        stop = ctx->hooks.progress(ctx->hooks.user, &p);
    }
    mem_free(text);
    return !stop;
}

/* ---- the loop ---- */

/* Throws before weights change if the loss is not a number. */
static void train_check_loss(const rlhf_trainer *t, double loss) {
    if (!isfinite(loss))
        err_throw(
            t->ctx, RLHF_ERR_NUMERIC,
            "step %lld: the loss is not finite; the weights are those of the optimizer step before",
            (long long)t->step + 1);
}

/* One step and its metrics, nothing of what follows it. */
static void train_step(rlhf_trainer *t) {
    if (t->fresh) train_open_dir(t);
    if (t->step >= t->total)
        err_throw(t->ctx, RLHF_ERR_ARG, "the run is over: all %lld steps are done",
                  (long long)t->total);
    opt_attach(t->opt);
    arena_reset(&t->ws);
    t->ops->step(t);
    t->step++;
    train_put(t, "epoch", (double)t->step / (double)t->per_epoch);
}

/* The remaining steps and what follows them. Returns 0 if the progress hook stopped the run; its
 * state is then saved. */
static int train_run(rlhf_trainer *t) {
    const train_config *c = &t->u.c;
    if (t->fresh) train_open_dir(t);
    while (t->owed || t->step < t->total) {
        if (!t->owed) {
            train_step(t);
            t->owed = 1;
            t->logged = 0;
        }
        /* What follows the step. `logged` keeps a part already done from being done twice after an
         * error. */
        int last = t->step == t->total;
        int line = t->step % c->logging_steps == 0 || last;
        int eval =
            t->ops->eval && t->eval && (last || (c->eval_steps && t->step % c->eval_steps == 0));
        if (eval && !t->logged) {
            arena_reset(&t->ws);
            t->ops->eval(t);
        }
        if (last && t->ops->finish && !t->logged) {
            arena_reset(&t->ws);
            t->ops->finish(t);
        }
        int go_on = t->logged || train_log(t, line || eval);
        t->logged = 1;
        /* A stop saves the state; the last step needs none, the run is about to end by itself. */
        int save = c->save_steps && t->step % c->save_steps == 0;
        if (train_dir(t) && (save || (!go_on && !last))) train_save_state(t);
        t->owed = 0;
        if (!go_on && !last) return 0;
    }
    /* The trained model in the run directory itself, ready for transformers and the other
     * commands. */
    if (train_dir(t) && !t->finished) {
        ckpt_save(t->model, train_dir(t), t->u.c.save_dtype[0] == 'b' ? 'b' : '4');
        if (t->tok) tok_save(t->tok, train_dir(t));
        train_sample(t);
    }
    t->finished = 1;
    return 1;
}

/* ============================================================================================
 * MARK: - 28 SFT (sft_)
 * Supervised fine-tuning: mean negative log-likelihood of the tokens that bear loss, over all the
 * micro-batches of an optimizer step:
 *     L = -1/N sum over marked t of log p(x_t | x_<t),    N the marked tokens of the whole step
 * The mean is over tokens, not over sequences or micro-batches, so that neither padding nor the way
 * a batch is cut weighs in.
 * Tests: test/test_golden.c, test/test_train.c
 * ============================================================================================ */

enum { SFT_SAMPLE_ROOM = 64 }; /* tokens of an answer in samples.jsonl */

/* Rows of a batch whose next token bears loss, and that token: [n], in the batch's order. */
typedef struct sft_rows {
    int n;
    int *row;
    int32_t *target;
} sft_rows;

/* Tokens that bear loss; the first has nothing to be predicted from. */
static int sft_count(const data_seq *s) {
    int n = 0;
    for (int t = 1; t < s->n; t++) n += s->loss[t];
    return n;
}

/* n sequences as one batch in ws, with the rows that meet the vocabulary. */
static model_run sft_batch(arena *ws, const data_seq *const *seq, int n, sft_rows *rows) {
    const int32_t **ids = arena_alloc(ws, (size_t)n * sizeof *ids);
    int *len = arena_alloc(ws, (size_t)n * sizeof *len), count = 0;
    for (int i = 0; i < n; i++) {
        ids[i] = seq[i]->ids;
        len[i] = seq[i]->n;
        count += sft_count(seq[i]);
    }
    model_run run = model_batch(ws, n, ids, len);
    rows->row = arena_alloc(ws, (size_t)(count + 1) * sizeof *rows->row);
    rows->target = arena_alloc(ws, (size_t)(count + 1) * sizeof *rows->target);
    /* The state before token t predicts it: row t - 1 of the sequence. */
    rows->n = 0;
    for (int i = 0; i < n; i++)
        for (int t = 1; t < seq[i]->n; t++)
            if (seq[i]->loss[t]) {
                rows->row[rows->n] = run.seq[i].row + t - 1;
                rows->target[rows->n++] = seq[i]->ids[t];
            }
    return run;
}

/* Sums over tokens. */
typedef struct sft_sums {
    double nll, entropy;
    int64_t hits, tokens;
} sft_sums;

/* d loss / d logp: the same for every token. */
static void sft_coef(void *user, int row, int n, const op_rows *found, float *coef) {
    const float *c = user;
    (void)row, (void)found;
    for (int i = 0; i < n; i++) coef[i] = *c;
}

/* A batch of an optimizer step: what nll is multiplied by, and as in model_for_training. */
typedef struct sft_part {
    double scale;
    uint64_t seed;
    int first;
} sft_part;

/* One batch: adds to the sums and, with train, to the gradients those of nll * scale. Without train
 * nothing is kept for a backward pass. */
static void sft_pass(rlhf_model *m, arena *ws, const data_seq *const *seq, int n,
                     const sft_part *train, sft_sums *sums) {
    arena_mark mark = arena_save(ws);
    sft_rows rows;
    model_run run = sft_batch(ws, seq, n, &rows);
    if (rows.n) {
        if (train) model_for_training(m, ws, &run, train->seed, train->first);
        model_forward(m, ws, &run);
        model_top top = model_top_fwd(m, ws, run.x, rows.row, rows.n);
        op_rows out = {.logp = arena_floats(ws, (size_t)rows.n, 1),
                       .entropy = arena_floats(ws, (size_t)rows.n, 1),
                       .hit = arena_alloc(ws, (size_t)rows.n)};
        /* Training keeps no panels of the head: its own change each step, and of a frozen one the
         * few rows are little of the work. */
        op_weight w = model_head_weight(m, train ? INT_MAX : rows.n);
        op_env e = {m->ctx, ws};
        /* Log-probabilities in chunks; their gradient in the same pass. */
        float coef = train ? (float)-train->scale : 0,
              *dh = train ? arena_floats(ws, (size_t)rows.n, (size_t)m->c.d) : NULL;
        op_vocab_run(&e, &w, rows.n, top.h, rows.target, 1.0f, &out, train ? sft_coef : NULL, &coef,
                     dh);
        if (train) model_backward(m, ws, &run, model_top_bwd(m, ws, &top, dh, run.rows));
        for (int i = 0; i < rows.n; i++) {
            sums->nll -= (double)out.logp[i];
            sums->entropy += (double)out.entropy[i];
            sums->hits += out.hit[i];
        }
        sums->tokens += rows.n;
    }
    arena_restore(ws, mark);
}

/* One optimizer step: the window's micro-batches add up their gradients. */
static void sft_step(rlhf_trainer *t) {
    int from, n = train_window(t, &from), *len = arena_alloc(&t->ws, (size_t)n * sizeof *len);
    const data_seq **seq = arena_alloc(&t->ws, (size_t)n * sizeof *seq);
    int64_t labels = 0, tokens = 0;
    for (int i = 0; i < n; i++) {
        seq[i] = &t->train->record[t->order[from + i]].a;
        labels += sft_count(seq[i]);
        tokens += len[i] = seq[i]->n;
    }
    /* The divisor is known before the first batch, so gradients are scaled once. */
    sft_sums sums = {0};
    double lr = train_lr(t);
    opt_zero(t->opt);
    for (int i = 0, k; i < n; i += k) {
        sft_part part = {1.0 / (double)labels, train_seed(t), i};
        k = train_cut(t, len, i, n);
        sft_pass(t->model, &t->ws, seq + i, k, &part, &sums);
    }
    double loss = sums.nll / (double)labels;
    train_check_loss(t, loss);
    double norm = opt_step(t->opt, &lr);
    t->tokens += tokens;
    train_put(t, "loss", loss);
    train_put(t, "grad_norm", norm);
    train_put(t, "learning_rate", lr);
    train_put(t, "entropy", sums.entropy / (double)labels);
    train_put(t, "mean_token_accuracy", (double)sums.hits / (double)labels);
    train_put(t, "num_tokens", (double)t->tokens);
}

/* Sums over n sequences. */
static sft_sums sft_measure(rlhf_model *m, arena *ws, const data_seq *const *seq, int n) {
    sft_sums sums = {0};
    int *len = arena_alloc(ws, (size_t)n * sizeof *len);
    for (int i = 0; i < n; i++) len[i] = seq[i]->n;
    for (int i = 0, k; i < n; i += k) {
        k = model_batch_count(m, len, i, n);
        sft_pass(m, ws, seq + i, k, NULL, &sums);
    }
    return sums;
}

/* Puts eval_* metrics over the whole evaluation set. */
static void sft_eval(rlhf_trainer *t) {
    const data_seq **seq = arena_alloc(&t->ws, (size_t)t->eval->n * sizeof *seq);
    for (int i = 0; i < t->eval->n; i++) seq[i] = &t->eval->record[i].a;
    sft_sums s = sft_measure(t->model, &t->ws, seq, t->eval->n);
    double n = (double)(s.tokens ? s.tokens : 1);
    train_put(t, "eval_loss", s.nll / n);
    train_put(t, "eval_mean_token_accuracy", (double)s.hits / n);
    train_put(t, "eval_num_tokens", (double)s.tokens);
}

/* What 26 needs to know of this trainer. */
static const train_ops sft_ops = {"sft",    RLHF_CONFIG_SFT, sft_step,         NULL,
                                  sft_eval, NULL,            train_record_size};

/* A trainer of a language model; eval and tok may be null. Arguments are checked, weights
 * untouched. */
static rlhf_trainer *sft_open(rlhf_model *model, rlhf_tokenizer *tok, rlhf_dataset *train,
                              rlhf_dataset *eval, const rlhf_sft_config *config) {
    model_need_lm(model);
    rlhf_trainer *t = train_new(model, tok, train, &sft_ops, config, sizeof *config);
    if (eval) train_check_records(model, eval);
    t->eval = eval;
    t->samples = (int)config->sample_prompts;
    t->sample_room = SFT_SAMPLE_ROOM;
    t->sample_stop = -1;
    train_set_length(t, config->per_device_train_batch_size * config->gradient_accumulation_steps);
    train_optimizer(t, &model, 1);
    train_plan(t);
    return t;
}

/* ============================================================================================
 * MARK: - 29 RM (rm_)
 * The reward model: a score at the last token, trained on pairs by the Bradley-Terry likelihood
 * (Bradley and Terry 1952; Stiennon et al. 2020): P(chosen beats rejected) = sigmoid(r_c - r_r).
 * Over the pairs of an optimizer step, w the weight and m the margin of a pair, y the probability
 * that its chosen answer is the better one (1 unless its record or its annotators say otherwise),
 *     L = mean of w (-y log sigmoid(z) - (1 - y) log sigmoid(-z)) + c mean of (r_c + r_r)^2
 *     z = (r_c - r_r - m) b_a,    b_a = 1 or, with annotator_temperatures, 1 / T_a of annotator a
 * A temperature says how far a's choices follow the rewards: those of a careless one are as good as
 * drawn (T large), and then weigh little. Learned are t_a = log b_a = -log T_a, from 0, by the same
 * AdamW, with a normal prior of deviation RM_SPREAD: over the N records of the training data
 *     total = sum of L + sum over a of t_a^2 / (2 RM_SPREAD^2),    sum over records of t_a = 0
 * The second equation takes out the scale that rewards and temperatures share. b_a is positive:
 * whoever is wrong more often than right can only be ignored.
 * The likelihood leaves a constant free, hence the second term, and scale and origin of the scores
 * to chance: after training they are normalised so that answers of the starting model score with
 * mean 0 and deviation 1 (Ziegler et al. 2019), and a KL coefficient means the same for every
 * reward model.
 * Tests: test/test_golden.c, test/test_train.c, test/test_rater.c
 * ============================================================================================ */

/* How far annotators' log temperatures lie apart, before anything is known. */
#define RM_SPREAD 1.0

/* -log sigmoid(z) = log(1 + e^-z), without overflow for either sign. Reported only: gradients come
 * from v_sigmoid1. */
static double rm_loss(double z) { return (z < 0 ? -z : 0) + log1p(exp(-fabs(z))); }

/* Sums and extremes over pairs, in raw scores. */
typedef struct rm_sums {
    double loss, margin, correct, total, min, max; /* ties count half */
    int64_t pairs;
} rm_sums;

/* 1 if the scores a (chosen) and b (rejected) prefer what the label does; ties count half. */
static double rm_hit(const data_record *rec, double a, double b) {
    double sign = (a - b) * (0.5 - rec->doubt);
    return sign > 0 ? 1 : sign < 0 ? 0 : 0.5;
}

/* Adds one pair with scores a (chosen) and b (rejected); sharp: b_a of the loss. */
static void rm_add(rm_sums *s, const data_record *rec, double a, double b, double sharp) {
    double z = (a - b - rec->margin) * sharp;
    s->loss += rec->weight * ((1 - rec->doubt) * rm_loss(z) + rec->doubt * rm_loss(-z));
    s->margin += a - b;
    s->correct += rm_hit(rec, a, b);
    s->total += a + b;
    s->min = s->pairs ? fmin(s->min, fmin(a, b)) : fmin(a, b);
    s->max = s->pairs ? fmax(s->max, fmax(a, b)) : fmax(a, b);
    s->pairs++;
}

/* Puts the means as metrics, their names with the prefix. */
static void rm_put(rlhf_trainer *t, const char *prefix, const rm_sums *s) {
    double n = (double)(s->pairs ? s->pairs : 1);
    const struct {
        const char *name;
        double value;
    } m[] = {{"loss", s->loss / n},     {"accuracy", s->correct / n},
             {"margin", s->margin / n}, {"mean_reward", s->total / (2 * n)},
             {"min_reward", s->min},    {"max_reward", s->max}};
    for (size_t i = 0; i < sizeof m / sizeof *m; i++) {
        char name[40];
        snprintf(name, sizeof name, "%s%s", prefix, m[i].name);
        train_put(t, name, m[i].value);
    }
}

/* The number of a training record's annotator, -1: nothing is learned of them. */
static int rm_annotator(const rlhf_trainer *t, const data_record *rec) {
    return t->who.n ? t->who.of[rec - t->train->record] : -1;
}

/* One micro-batch, pairs first to first + n out of `of` in the step: gradients and sums. Both
 * answers of a pair are sequences of one batch, chosen at even places. */
static void rm_pass(rlhf_trainer *t, const data_record *const *rec, int first, int n, int of,
                    rm_sums *sums) {
    arena *ws = &t->ws;
    arena_mark mark = arena_save(ws);
    double center = t->u.rm.center_rewards_coefficient;
    const int32_t **ids = arena_alloc(ws, (size_t)(2 * n) * sizeof *ids);
    int *len = arena_alloc(ws, (size_t)(2 * n) * sizeof *len);
    int *row = arena_alloc(ws, (size_t)(2 * n) * sizeof *row);
    for (int i = 0; i < n; i++) {
        ids[2 * i] = rec[i]->a.ids, len[2 * i] = rec[i]->a.n;
        ids[2 * i + 1] = rec[i]->b.ids, len[2 * i + 1] = rec[i]->b.n;
    }
    model_run run = model_batch(ws, 2 * n, ids, len);
    /* The score is read where the sequence ends. */
    for (int i = 0; i < 2 * n; i++) row[i] = run.seq[i].row + run.seq[i].n - 1;
    model_for_training(t->model, ws, &run, train_seed(t), 2 * first);
    model_forward(t->model, ws, &run);
    model_top top = model_top_fwd(t->model, ws, run.x, row, 2 * n);
    float *score = arena_floats(ws, (size_t)(2 * n), 2), *d = score + 2 * n;
    model_scores(t->model, ws, &top, score);
    for (int i = 0; i < n; i++) {
        float a = score[2 * i], b = score[2 * i + 1];
        /*     f = w (y sigmoid(-z) - (1 - y) sigmoid(z)) / of
         *     dL/dr_c = -f b_a + 2 c (r_c + r_r) / of        dL/dt_a = -f z
         * and the first with the first sign turned for r_r. In the code z is -z. */
        int who = rm_annotator(t, rec[i]);
        float sharp = who < 0 ? 1 : v_exp1(t->who.x[who]);
        float z = (b - a + (float)rec[i]->margin) * sharp, doubt = (float)rec[i]->doubt;
        float force = (1 - doubt) * v_sigmoid1(z) - doubt * v_sigmoid1(-z);
        float slope = -(float)rec[i]->weight * force * sharp / (float)of;
        if (who >= 0) t->who.g[who] += (float)rec[i]->weight * force * z / (float)of;
        float pull = 2.0f * (float)center * (a + b) / (float)of;
        d[2 * i] = slope + pull;
        d[2 * i + 1] = pull - slope;
        rm_add(sums, rec[i], (double)a, (double)b, (double)sharp);
        sums->loss += center * (double)(a + b) * (double)(a + b);
    }
    float *dh = arena_floats(ws, (size_t)top.n, (size_t)t->model->c.d);
    model_scores_bwd(t->model, ws, &top, d, dh);
    model_backward(t->model, ws, &run, model_top_bwd(t->model, ws, &top, dh, run.rows));
    arena_restore(ws, mark);
}

/* One AdamW step on what is learned of annotators, with the constants of the optimizer's step that
 * has just been done; then the mean over records is 0 again. */
static void rm_step_annotators(rlhf_trainer *t) {
    const rlhf_rm_config *c = &t->u.rm;
    train_annotators *w = &t->who;
    double n = 0, mean = 0;
    for (int i = 0; i < w->n; i++) n += w->judgements[i];
    for (int i = 0; i < w->n; i++) w->g[i] += w->x[i] / (float)(RM_SPREAD * RM_SPREAD * n);
    k_adam a = t->opt->now[0][0];
    a.lr = (float)(c->annotator_learning_rate *
                   opt_schedule(c->lr_scheduler_type, t->step, c->warmup_steps, t->total));
    a.clip = 1;
    t->ctx->k->adam(w->n, w->x, w->g, w->m, w->v, &a);
    for (int i = 0; i < w->n; i++) mean += w->judgements[i] / n * (double)w->x[i];
    for (int i = 0; i < w->n; i++) w->x[i] -= (float)mean;
}

/* One optimizer step over the window's pairs. */
static void rm_step(rlhf_trainer *t) {
    int from, n = train_window(t, &from), *len = arena_alloc(&t->ws, (size_t)n * sizeof *len);
    const data_record **rec = arena_alloc(&t->ws, (size_t)n * sizeof *rec);
    int64_t tokens = 0;
    for (int i = 0; i < n; i++) {
        rec[i] = t->train->record + t->order[from + i];
        tokens += len[i] = rec[i]->a.n + rec[i]->b.n;
    }
    rm_sums sums = {0};
    double lr = train_lr(t);
    opt_zero(t->opt);
    if (t->who.n) memset(t->who.g, 0, (size_t)t->who.n * sizeof(float));
    for (int i = 0, k; i < n; i += k) {
        k = train_cut(t, len, i, n);
        rm_pass(t, rec + i, i, k, n, &sums);
    }
    train_check_loss(t, sums.loss);
    double norm = opt_step(t->opt, &lr);
    if (t->who.n) rm_step_annotators(t);
    t->tokens += tokens;
    rm_put(t, "", &sums);
    train_put(t, "grad_norm", norm);
    train_put(t, "learning_rate", lr);
    train_put(t, "num_tokens", (double)t->tokens);
}

/* Raw scores of the chosen and rejected answers of a whole dataset, in ws: score[2 i], score[2 i +
 * 1]. */
static float *rm_score_pairs(rlhf_model *m, arena *ws, const rlhf_dataset *d) {
    int n = 2 * d->n;
    const int32_t **ids = arena_alloc(ws, (size_t)n * sizeof *ids);
    int *len = arena_alloc(ws, (size_t)n * sizeof *len);
    float *score = arena_floats(ws, (size_t)n, 1);
    for (int i = 0; i < n; i++) {
        const data_seq *s = i % 2 ? &d->record[i / 2].b : &d->record[i / 2].a;
        ids[i] = s->ids;
        len[i] = s->n;
    }
    model_score_list(m, ws, n, ids, len, score);
    return score;
}

/* Puts eval_* metrics over the whole evaluation set; its loss has no centering term. */
static void rm_eval(rlhf_trainer *t) {
    float *score = rm_score_pairs(t->model, &t->ws, t->eval);
    rm_sums sums = {0};
    for (int i = 0; i < t->eval->n; i++)
        rm_add(&sums, t->eval->record + i, (double)score[2 * i], (double)score[2 * i + 1], 1);
    rm_put(t, "eval_", &sums);
}

/* n answers that the starting model gives to prompts of the training data: whole sequences ids[i]
 * of len[i] tokens, in ws. Prompts are drawn without repetition as long as there are enough. */
static void rm_sample(rlhf_trainer *t, int n, const int32_t **ids, int *len) {
    const rlhf_rm_config *c = &t->u.rm;
    arena *ws = &t->ws;
    int room = (int)c->response_length,
        *order = arena_alloc(ws, (size_t)t->train->n * sizeof *order);
    rng_permutation((uint64_t)c->seed, RNG_PROMPT, 0, t->train->n, order);
    gen_item *item = arena_alloc(ws, (size_t)n * sizeof *item);
    memset(item, 0, (size_t)n * sizeof *item);
    for (int i = 0; i < n; i++) {
        const data_seq *s = &t->train->record[order[i % t->train->n]].a;
        int prompt = train_prompt(s);
        int32_t *whole = arena_alloc(ws, (size_t)(prompt + room) * sizeof *whole);
        memcpy(whole, s->ids, (size_t)prompt * sizeof *whole);
        item[i] = (gen_item){.prompt = whole,
                             .n_prompt = prompt,
                             .key = (uint64_t)i,
                             .turn_end = s->turn_end,
                             .out = whole + prompt};
        ids[i] = whole;
    }
    /* From the whole distribution, as PPO samples. */
    gen_config g = {.max_new = room,
                    .batch = TRAIN_SLOTS,
                    .temperature = (float)c->temperature,
                    .top_p = 1,
                    .seed = (uint64_t)c->seed,
                    .stop = -1};
    gen_run(t->start, ws, &g, item, n, NULL);
    for (int i = 0; i < n; i++) len[i] = item[i].n_prompt + item[i].n;
}

/* Measures mean and deviation of raw scores, over sampled answers where there is a starting model,
 * else over the training answers, and keeps them in the model (model_reward). After the last
 * step. */
static void rm_normalize(rlhf_trainer *t) {
    int n = (int)t->u.rm.normalize_samples;
    rlhf_model *m = t->model;
    if (n < 2) return;
    arena *ws = &t->ws;
    arena_free(ws); /* a training step's, which is larger than what follows */
    const int32_t **ids = arena_alloc(ws, (size_t)n * sizeof *ids);
    int *len = arena_alloc(ws, (size_t)n * sizeof *len);
    if (t->start) {
        rm_sample(t, n, ids, len);
    } else {
        n = base_min(n, 2 * t->train->n);
        for (int i = 0; i < n; i++) {
            const data_seq *s = i % 2 ? &t->train->record[i / 2].b : &t->train->record[i / 2].a;
            ids[i] = s->ids;
            len[i] = s->n;
        }
    }
    float *score = arena_floats(ws, (size_t)n, 1);
    model_score_list(m, ws, n, ids, len, score);
    /* The biased variance: the scores are all there is, not a sample of something to be
     * inferred. */
    double mean = 0, var = 0;
    for (int i = 0; i < n; i++) mean += (double)score[i] / n;
    for (int i = 0; i < n; i++) var += ((double)score[i] - mean) * ((double)score[i] - mean) / n;
    m->score_mean = (float)mean;
    /* Equal scores have no scale to divide by. */
    m->score_std = var > 1e-12 ? (float)sqrt(var) : 1.0f;
    train_put(t, "score_mean", (double)m->score_mean);
    train_put(t, "score_std", (double)m->score_std);
}

/* The records, and the answers that normalisation samples. */
static void rm_size(const rlhf_trainer *t, train_size *z) {
    const rlhf_rm_config *c = &t->u.rm;
    train_record_size(t, z);
    if (!t->start || c->normalize_samples < 2) return;
    train_add_sampler(t, z, t->start, base_min(TRAIN_SLOTS, (int)c->normalize_samples),
                      (int)c->response_length);
    z->scored = c->normalize_samples * z->sampler->len;
    z->after = 1;
}

/* Annotators with their temperatures, held. */
static json_t *rm_temperatures(const rlhf_trainer *t) {
    json_t *j = json_hold(t->ctx, json_object());
    for (int i = 0; i < t->who.n; i++)
        json_object_set_new(j, t->who.name[i],
                            json_pack("{s:i,s:f}", "judgements", t->who.judgements[i],
                                      "temperature", (double)v_exp1(-t->who.x[i])));
    return j;
}

/* After the last step. */
static void rm_finish(rlhf_trainer *t) {
    rm_normalize(t);
    if (!t->who.n || !train_dir(t)) return;
    json_write_file(t->ctx, ckpt_path(t->ctx, train_dir(t), "annotators.json"), rm_temperatures(t));
    err_release(t->ctx);
}

/* What 26 needs to know of this trainer. */
static const train_ops rm_ops = {"rm",    RLHF_CONFIG_RM, rm_step, NULL,
                                 rm_eval, rm_finish,      rm_size};

/* Numbers the annotators of the training data, each with t_a = 0. */
static void rm_open_annotators(rlhf_trainer *t) {
    rlhf_ctx *ctx = t->ctx;
    train_annotators *w = &t->who;
    const rlhf_dataset *d = t->train;
    json_t *numbers = json_hold(ctx, json_object());
    w->of = mem_zalloc(ctx, 2 * (size_t)d->n, sizeof *w->of);
    w->name = mem_zalloc(ctx, (size_t)d->n, sizeof *w->name);
    w->judgements = w->of + d->n;
    for (int i = 0; i < d->n; i++) {
        const char *name = d->record[i].annotator;
        const json_t *number = name ? json_object_get(numbers, name) : NULL;
        int k = number ? (int)json_integer_value(number) : name ? w->n++ : -1;
        w->of[i] = k;
        if (k < 0) continue;
        if (!number && json_object_set_new(numbers, name, json_integer(k)))
            err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a JSON value");
        w->name[k] = name;
        w->judgements[k]++;
    }
    err_release(ctx);
    if (!w->n)
        err_throw(ctx, RLHF_ERR_ARG,
                  "annotator_temperatures: no training record says who its \"annotator\" is");
    size_t n = (size_t)w->n;
    w->x = mem_zalloc(ctx, 4 * n, sizeof *w->x);
    w->g = w->x + n;
    w->m = w->g + n;
    w->v = w->m + n;
}

/* A trainer of a scorer; start, eval and tok may be null. A head that was never trained starts from
 * the seed; an earlier normalisation is forgotten, since it is measured again. */
static rlhf_trainer *rm_open(rlhf_model *model, rlhf_model *start, rlhf_tokenizer *tok,
                             rlhf_dataset *train, rlhf_dataset *eval,
                             const rlhf_rm_config *config) {
    if (model->c.head != RLHF_HEAD_SCORE)
        err_throw(
            model->ctx, RLHF_ERR_ARG,
            "a reward model needs a score head: rlhf_model_clone(model, RLHF_HEAD_SCORE, ...)");
    if (start) model_need_lm(start);
    rlhf_trainer *t = train_new(model, tok, train, &rm_ops, config, sizeof *config);
    if (eval) train_check_records(model, eval);
    t->eval = eval;
    t->start = start;
    if (config->annotator_temperatures && strcmp(config->annotator_weights, "none"))
        err_throw(model->ctx, RLHF_ERR_ARG,
                  "annotator_temperatures learn from each annotator's own choice, expected "
                  "annotator_weights \"none\"");
    if (config->annotator_temperatures) rm_open_annotators(t);
    train_set_length(t, config->per_device_train_batch_size * config->gradient_accumulation_steps);
    train_optimizer(t, &model, 1);
    if (!model->score_trained) model_init_score(model, (uint64_t)config->seed);
    model->score_trained = 1;
    model->score_mean = 0;
    model->score_std = 1;
    train_plan(t);
    return t;
}

/* ============================================================================================
 * MARK: - 30 PPO (ppo_)
 * Proximal policy optimisation with a per-token KL penalty (Schulman et al. 2017; Ziegler et al.
 * 2019; Stiennon et al. 2020). An update: sample answers, score them, turn scores and KL into
 * advantages, then num_ppo_epochs x num_mini_batches optimizer steps on policy and value model
 * together. Before the first of them every probability ratio is exactly 1, since sampling and
 * training compute the same bits. Policy, reference, reward and value model are separate models;
 * with shared_trunk the value model is a second head on the policy's states, and both losses go
 * through one backward pass.
 *
 *     stage            function             gives for token or state t
 *     sampling         ppo_generate         log p_t, the state h_t
 *     reference        ppo_reference        log p_ref,t, KL, entropy
 *     values           ppo_values           V_t
 *     scores           ppo_score            one number for the answer
 *     advantages       ppo_advantages       r_t = -coef kl_t [+ score], A_t, R_t  (25)
 *     optimisation     ppo_minibatch        loss = policy(A_t, log p_t) + vf_coef value(R_t, V_t)
 *
 * The reference is the policy as it was when the trainer was opened. Log-probabilities are those of
 * the sampling temperature everywhere. Metrics have TRL's names and meanings. All but the models
 * and their optimizer lies in the trainer's arena for the length of one update.
 *
 * Entry: ppo_open; ppo_step through ppo_ops.
 * Invariant: a rollout is a function of weights, seed and the number of episodes before it.
 * Tests: test/test_golden.c, test/test_ppo.c
 * ============================================================================================ */

/* ---- rollout ---- */

/* Rows of the coming update, with room for everything they will hold: batch_size prompts, the next
 * ones in the order of their epoch. */
static roll_row *ppo_rows_new(rlhf_trainer *t) {
    const rlhf_ppo_config *c = &t->u.ppo;
    arena *ws = &t->ws;
    int n = (int)c->batch_size, room = (int)c->response_length;
    size_t d = (size_t)t->model->c.d;
    roll_row *row = arena_alloc(ws, (size_t)n * sizeof *row);
    memset(row, 0, (size_t)n * sizeof *row);
    for (int i = 0; i < n; i++) {
        /* An update may begin in one epoch and end in the next. */
        int64_t at = t->episodes + i, epoch = at / t->train->n;
        if (epoch != t->order_epoch) {
            data_order((uint64_t)c->seed, epoch, c->shuffle_dataset, t->train->n, t->order);
            t->order_epoch = epoch;
        }
        roll_row *r = row + i;
        r->index = t->order[at % t->train->n];
        r->record = t->train->record + r->index;
        r->n_prompt = r->record->a.n;
        r->ids = arena_alloc(ws, (size_t)(r->n_prompt + room) * sizeof *r->ids);
        memcpy(r->ids, r->record->a.ids, (size_t)r->n_prompt * sizeof *r->ids);
        r->hidden = arena_floats(ws, (size_t)room, d);
        /* Eight arrays of room + 1: a state behind the end may have a value. */
        float *f = arena_zeros(ws, (size_t)room + 1, 8);
        r->logp = f, r->ref_logp = f + (room + 1), r->kl = f + 2 * (room + 1),
        r->entropy = f + 3 * (room + 1);
        r->value = f + 4 * (room + 1), r->reward = f + 5 * (room + 1), r->adv = f + 6 * (room + 1);
        r->ret = f + 7 * (room + 1);
    }
    return row;
}

/* Samples every row's answer, its log-probabilities and the states they were drawn from. */
static void ppo_generate(rlhf_trainer *t, roll_row *row, int n) {
    const rlhf_ppo_config *c = &t->u.ppo;
    gen_item *item = arena_alloc(&t->ws, (size_t)n * sizeof *item);
    for (int i = 0; i < n; i++)
        item[i] = (gen_item){.prompt = row[i].ids,
                             .n_prompt = row[i].n_prompt,
                             .key = (uint64_t)(t->episodes + i),
                             .turn_end = row[i].record->a.turn_end,
                             .out = row[i].ids + row[i].n_prompt,
                             .logp = row[i].logp,
                             .hidden = row[i].hidden};
    /* Neither top_k nor top_p: the ratio needs every token's probability to be the policy's own. */
    gen_config g = {.max_new = (int)c->response_length,
                    .batch = n,
                    .temperature = (float)c->temperature,
                    .top_p = 1,
                    .seed = (uint64_t)c->seed,
                    .stop = (int)c->stop_token_id};
    train_generate(t, &g, item, n);
    for (int i = 0; i < n; i++) {
        row[i].n = item[i].n;
        row[i].finished = item[i].finished;
        row[i].n_value =
            row[i].n + (!strcmp(c->reward_at, "p1") && row[i].n < (int)c->response_length);
    }
}

/* Whole sequences of some rows as one batch. */
static model_run ppo_batch(arena *ws, roll_row *const *row, int n) {
    const int32_t **ids = arena_alloc(ws, (size_t)n * sizeof *ids);
    int *len = arena_alloc(ws, (size_t)n * sizeof *len);
    for (int i = 0; i < n; i++) {
        ids[i] = row[i]->ids;
        len[i] = row[i]->n_prompt + row[i]->n;
    }
    return model_batch(ws, n, ids, len);
}

/* Batch rows of the states before each of the answers' tokens, *count of them: state s of a row is
 * the position of token n_prompt - 1 + s. values: also the one behind its end where it counts. */
static int *ppo_states(arena *ws, const model_run *run, roll_row *const *row, int n, int values,
                       int *count) {
    int total = 0, at = 0;
    for (int i = 0; i < n; i++) total += values ? row[i]->n_value : row[i]->n;
    int *out = arena_alloc(ws, (size_t)(total + 1) * sizeof *out);
    for (int i = 0; i < n; i++)
        for (int s = 0; s < (values ? row[i]->n_value : row[i]->n); s++)
            out[at++] = run->seq[i].row + row[i]->n_prompt - 1 + s;
    *count = total;
    return out;
}

/* The answers' tokens, in the order of ppo_states without values. */
static int32_t *ppo_targets(arena *ws, roll_row *const *row, int n, int total) {
    int32_t *out = arena_alloc(ws, (size_t)(total + 1) * sizeof *out);
    for (int i = 0, at = 0; i < n; i++)
        for (int s = 0; s < row[i]->n; s++) out[at++] = row[i]->ids[row[i]->n_prompt + s];
    return out;
}

/* The policy's states of sampling, in the order of ppo_states without values. */
static float *ppo_hidden(arena *ws, roll_row *const *row, int n, int total, size_t d) {
    float *h = arena_floats(ws, (size_t)total, d);
    for (int i = 0, at = 0; i < n; at += row[i++]->n)
        memcpy(h + (size_t)at * d, row[i]->hidden, (size_t)row[i]->n * d * sizeof *h);
    return h;
}

/* Reference log-probabilities, the exact KL and the entropy of the policy, from its saved states:
 * only the reference runs, the policy's states of sampling are its states. */
static void ppo_reference(rlhf_trainer *t, roll_row *const *row, int n) {
    arena *ws = &t->ws;
    rlhf_model *p = t->model, *ref = t->start;
    model_run run = ppo_batch(ws, row, n);
    int total, *state = ppo_states(ws, &run, row, n, 0, &total);
    int32_t *target = ppo_targets(ws, row, n, total);
    model_forward(ref, ws, &run);
    model_top top = model_top_fwd(ref, ws, run.x, state, total);
    float *hidden = ppo_hidden(ws, row, n, total, (size_t)p->c.d);
    /* f: logp, entropy, kl, ref_logp, [total] each. */
    float *f = arena_floats(ws, (size_t)total, 4);
    op_rows out = {.logp = f, .entropy = f + total};
    op_weight w = model_head_weight(p, total), w2 = model_head_weight(ref, total);
    op_env e = {t->ctx, ws};
    op_vocab_compare(&e, &w, hidden, &w2, top.h, total, target, 1.0f / (float)t->u.ppo.temperature,
                     &out, f + 2 * total, f + 3 * total);
    for (int i = 0, at = 0; i < n; at += row[i++]->n) {
        size_t bytes = (size_t)row[i]->n * sizeof(float);
        memcpy(row[i]->entropy, out.entropy + at, bytes);
        memcpy(row[i]->kl, f + 2 * total + at, bytes);
        memcpy(row[i]->ref_logp, f + 3 * total + at, bytes);
    }
}

/* Values of all states, in units of the reward, before any step of the update. A head on the
 * policy's trunk reads the states of sampling; only one behind an answer's end has to be computed.
 */
static void ppo_values(rlhf_trainer *t, roll_row *const *row, int n) {
    arena *ws = &t->ws;
    int shared = t->u.ppo.shared_trunk, tokens = 0, total;
    rlhf_model *trunk = shared ? t->model : t->value;
    model_run run = ppo_batch(ws, row, n);
    int *state = ppo_states(ws, &run, row, n, 1, &total);
    for (int i = 0; i < n; i++) tokens += row[i]->n;
    model_top top = {.n = total};
    if (shared && total == tokens) {
        top.h = ppo_hidden(ws, row, n, total, (size_t)trunk->c.d);
    } else {
        model_forward(trunk, ws, &run);
        top = model_top_fwd(trunk, ws, run.x, state, total);
    }
    float *v = arena_floats(ws, (size_t)total, 1);
    model_scores(t->value, ws, &top, v);
    for (int i = 0, at = 0; i < n; at += row[i++]->n_value)
        for (int s = 0; s < row[i]->n_value; s++)
            row[i]->value[s] = model_reward(t->value, v[at + s]);
}

/* Calls pass on all rows in batches of a bounded number of tokens. */
static void ppo_each_batch(rlhf_trainer *t, roll_row *const *row, int n,
                           void (*pass)(rlhf_trainer *, roll_row *const *, int)) {
    int *len = arena_alloc(&t->ws, (size_t)n * sizeof *len);
    for (int i = 0; i < n; i++) len[i] = row[i]->n_prompt + row[i]->n;
    /* What a pass allocates goes with its batch; its results lie in the rows. */
    for (int at = 0, k; at < n; at += k) {
        arena_mark mark = arena_save(&t->ws);
        k = model_batch_count(t->model, len, at, n);
        pass(t, row + at, k);
        arena_restore(&t->ws, mark);
    }
}

/* ---- scores ---- */

/* Has the host score all n answers at once into out[n]. NaN, which is also what an untouched entry
 * holds, means that the function does not apply. The samples' texts are blocks of this call. */
static void ppo_call_function(rlhf_trainer *t, roll_row *const *row, int n, float *out) {
    arena *ws = &t->ws;
    rlhf_sample *s = arena_alloc(ws, (size_t)n * sizeof *s);
    for (int i = 0; i < n; i++) {
        const roll_row *r = row[i];
        double logp = 0;
        for (int k = 0; k < r->n; k++) logp += (double)r->logp[k];
        s[i] = (rlhf_sample){.prompt = r->record->prompt,
                             .prompt_ids = r->ids,
                             .n_prompt = r->n_prompt,
                             .completion_ids = r->ids + r->n_prompt,
                             .n_completion = r->n,
                             .finished = r->finished,
                             .logprob = logp,
                             .record = r->record->line,
                             .prompt_index = r->index};
        s[i].completion = t->tok ? gen_text(t->tok, s[i].completion_ids, r->n) : "";
    }
    /* The host's code runs here, within the step; it may use the library with the same context. */
    for (int i = 0; i < n; i++) out[i] = NAN;
    rlhf_status status = t->fn(t->user, s, n, out);
    if (status == RLHF_STOPPED)
        err_throw(t->ctx, RLHF_STOPPED, "the reward function asked to stop");
    if (status != RLHF_OK)
        err_throw(t->ctx, RLHF_ERR_CALLBACK, "the reward function failed: %s",
                  rlhf_status_text(status));
    for (int i = 0; i < n; i++) {
        if (t->tok) mem_free((char *)(uintptr_t)s[i].completion);
        if (isinf(out[i]))
            err_throw(t->ctx, RLHF_ERR_CALLBACK,
                      "the reward function gave an infinite reward to sample %d", i);
    }
}

/* The score of every answer: reward model (normalised), function, or their sum; less the penalty
 * for a missing end. */
static void ppo_score(rlhf_trainer *t, roll_row *const *row, int n) {
    arena *ws = &t->ws;
    arena_mark mark = arena_save(ws);
    float *score = arena_floats(ws, (size_t)n, 1);
    for (int i = 0; i < n; i++) row[i]->score = 0;
    /* The reward model reads prompt and answer, the end token included. */
    if (t->reward) {
        const int32_t **ids = arena_alloc(ws, (size_t)n * sizeof *ids);
        int *len = arena_alloc(ws, (size_t)n * sizeof *len);
        for (int i = 0; i < n; i++) {
            ids[i] = row[i]->ids;
            len[i] = row[i]->n_prompt + row[i]->n;
        }
        model_score_list(t->reward, ws, n, ids, len, score);
        for (int i = 0; i < n; i++) row[i]->score += model_reward(t->reward, score[i]);
    }
    if (t->fn) {
        ppo_call_function(t, row, n, score);
        for (int i = 0; i < n; i++)
            if (!isnan(score[i])) row[i]->score += score[i];
    }
    for (int i = 0; i < n; i++)
        if (!row[i]->finished) row[i]->score -= (float)t->u.ppo.missing_eos_penalty;
    arena_restore(ws, mark);
}

/* Rewards, whitening, advantages and returns of a scored rollout. Whitened rewards keep their mean,
 * since values must still predict returns; whitened advantages have mean 0 (TRL's whitening). The
 * returns are made before, so they are in units of the reward. */
static void ppo_advantages(rlhf_trainer *t, roll_row *const *row, int n) {
    const rlhf_ppo_config *c = &t->u.ppo;
    arena_mark mark = arena_save(&t->ws);
    roll_piece *p = arena_alloc(&t->ws, (size_t)n * sizeof *p);
    double penalty = 0;
    for (int i = 0; i < n; i++)
        penalty += roll_rewards(row[i], t->kl_coef, !strcmp(c->kl_estimator, "k3"));
    if (c->whiten_rewards) {
        for (int i = 0; i < n; i++) p[i] = (roll_piece){row[i]->reward, row[i]->n_value};
        roll_whiten(p, n, 1);
    }
    for (int i = 0; i < n; i++) roll_gae(row[i], c->gamma, c->lam);
    if (c->whiten_advantages) {
        for (int i = 0; i < n; i++) p[i] = (roll_piece){row[i]->adv, row[i]->n};
        roll_whiten(p, n, 0);
    }
    train_put(t, "objective/non_score_reward", penalty / n);
    arena_restore(&t->ws, mark);
}

/* The share of an answer's runs of three tokens that stood in it before: 0 where none is repeated.
 */
static double ppo_repetition(const int32_t *ids, int n) {
    int again = 0;
    for (int i = 1; i + 3 <= n; i++)
        for (int k = 0, same = 0; k < i && !same; k++)
            again += same = !memcmp(ids + k, ids + i, 3 * sizeof *ids);
    return n > 2 ? (double)again / (n - 2) : 0;
}

/* What was sampled, in TRL's names: sums over an answer's tokens, means over answers. The entropy
 * here is the sampled one, -log p; kl_exact sums over the vocabulary in every state of the
 * answers. */
static void ppo_rollout_metrics(rlhf_trainer *t, roll_row *const *row, int n) {
    double k1 = 0, k3 = 0, exact = 0, entropy = 0, score = 0, eos = 0, length = 0, again = 0;
    for (int i = 0; i < n; i++) {
        const roll_row *r = row[i];
        for (int s = 0; s < r->n; s++) {
            double u = (double)r->logp[s] - (double)r->ref_logp[s];
            k1 += u;
            k3 += (double)v_exp1((float)-u) - 1.0 + u;
            exact += (double)r->kl[s];
            entropy -= (double)r->logp[s];
        }
        score += (double)r->score;
        eos += r->finished;
        length += r->n;
        again += ppo_repetition(r->ids + r->n_prompt, r->n);
    }
    /* objective/kl is what the penalty is made of. */
    int use_k3 = !strcmp(t->u.ppo.kl_estimator, "k3");
    double penalty = 0;
    for (int i = 0; i < t->metrics; i++)
        if (!strcmp(t->metric[i].name, "objective/non_score_reward")) penalty = t->metric[i].value;
    train_put(t, "objective/kl", (use_k3 ? k3 : k1) / n);
    train_put(t, "objective/kl_k1", k1 / n);
    train_put(t, "objective/kl_k3", k3 / n);
    train_put(t, "objective/kl_exact", exact / n);
    train_put(t, "objective/entropy", entropy / n);
    train_put(t, "objective/scores", score / n);
    train_put(t, "objective/rlhf_reward", score / n + penalty);
    train_put(t, "objective/kl_coef", t->kl_coef);
    train_put(t, "val/num_eos_tokens", eos);
    train_put(t, "completions/mean_length", length / n);
    train_put(t, "completions/clipped_ratio", 1 - eos / n);
    train_put(t, "completions/repetition", again / n);
}

/* ---- optimisation ---- */

/* Sums of each minibatch's means, over all minibatches of the update; norm is the gradient's. */
typedef struct ppo_sums {
    double policy, value, kl, clipped, value_clipped, entropy, ratio, ratio_sq, first_ratio, norm;
    int64_t minibatches;
} ppo_sums;

/* One micro-batch's policy loss, for the coefficients behind the log-probabilities. */
typedef struct ppo_policy {
    const float *old, *adv;                   /* [tokens] */
    double clip, scale;                       /* scale: 1 / tokens of the minibatch */
    double loss, kl, clipped, entropy, ratio; /* sums over tokens */
} ppo_policy;

/* The clipped surrogate (Schulman et al. 2017) of one token and its slope in log rho, where rho = p
 * / p_old:
 *     L = max(-A rho, -A clip(rho, 1 - eps, 1 + eps))
 *     dL / d log rho = -A rho where the first is the larger, else 0
 * approxkl is half the mean square of log rho, clipfrac the share of tokens where the second
 * won. */
static void ppo_policy_coef(void *user, int row, int n, const op_rows *found, float *coef) {
    ppo_policy *p = user;
    for (int i = 0; i < n; i++) {
        float diff = found->logp[i] - p->old[row + i], adv = p->adv[row + i], ratio = v_exp1(diff);
        float lo = 1.0f - (float)p->clip, hi = 1.0f + (float)p->clip;
        float bound = ratio < lo ? lo : ratio > hi ? hi : ratio;
        float free_loss = -adv * ratio, clip_loss = -adv * bound;
        coef[i] = free_loss >= clip_loss ? (float)((double)free_loss * p->scale) : 0.0f;
        p->loss += (double)(free_loss >= clip_loss ? free_loss : clip_loss);
        p->clipped += clip_loss > free_loss;
        p->kl += 0.5 * (double)diff * (double)diff;
        p->ratio += (double)ratio;
        p->entropy += (double)found->entropy[i];
    }
}

/* The policy loss of one micro-batch: adds to p's sums and to the output matrix's gradient, and
 * sets dh, the gradient of the states of ppo_states without values; with `add` top and dh are those
 * with values, and it is added to what dh holds. */
static void ppo_policy_loss(rlhf_trainer *t, roll_row *const *row, int n, const model_top *top,
                            ppo_policy *p, float *dh, int add) {
    arena *ws = &t->ws;
    rlhf_model *m = t->model;
    size_t d = (size_t)m->c.d;
    int total = 0;
    for (int i = 0; i < n; i++) total += row[i]->n;
    int skip = top->n > total; /* states behind ends lie between */
    int32_t *target = ppo_targets(ws, row, n, total);
    float *f = arena_floats(ws, (size_t)total, 4), *old = f, *adv = f + total;
    float *h = skip ? arena_floats(ws, (size_t)total, d) : top->h;
    float *part = add ? arena_floats(ws, (size_t)total, d) : dh;
    /* What was recorded, in the order of the batch's rows. */
    for (int i = 0, at = 0, from = 0; i < n; at += row[i]->n, from += row[i++]->n_value) {
        memcpy(old + at, row[i]->logp, (size_t)row[i]->n * sizeof *old);
        memcpy(adv + at, row[i]->adv, (size_t)row[i]->n * sizeof *adv);
        if (skip)
            memcpy(h + (size_t)at * d, top->h + (size_t)from * d,
                   (size_t)row[i]->n * d * sizeof *h);
    }
    p->old = old;
    p->adv = adv;
    /* The loss enters as d loss / d logp, chunk by chunk, once the log-probabilities are known. */
    op_rows out = {.logp = f + 2 * total, .entropy = f + 3 * total};
    op_weight w = model_head_weight(m, INT_MAX);
    op_env e = {t->ctx, ws};
    op_vocab_run(&e, &w, total, h, target, 1.0f / (float)t->u.ppo.temperature, &out,
                 ppo_policy_coef, p, part);
    for (int i = 0, at = 0, to = 0; add && i < n; at += row[i]->n, to += row[i++]->n_value)
        t->ctx->k->add(row[i]->n * (int)d, part + (size_t)at * d, dh + (size_t)to * d);
}

/* One micro-batch's value loss, for sums over states. */
typedef struct ppo_value {
    double range, scale; /* scale: vf_coef / states of the minibatch */
    double loss, clipped;
} ppo_value;

/* The value loss of one micro-batch, clipped to the old values (TRL; Schulman's baselines); adds to
 * v's sums and the head's gradient, and sets dh, the gradient of the states.
 *     L = 1/2 max((x - R)^2, (clip(x, x_old - range, x_old + range) - R)^2)
 * x is the normalised output (s - mean) / std of score s, hence 1 / std in the slope. */
static void ppo_value_loss(rlhf_trainer *t, roll_row *const *row, int n, const model_top *top,
                           ppo_value *v, float *dh) {
    rlhf_model *m = t->value;
    float range = (float)v->range, std = m->score_std > 1e-8f ? m->score_std : 1e-8f;
    float *score = arena_floats(&t->ws, (size_t)top->n, 2), *ds = score + top->n;
    model_scores(m, &t->ws, top, score);
    for (int i = 0, at = 0; i < n; i++)
        for (int s = 0; s < row[i]->n_value; s++, at++) {
            /* The larger of both losses counts, so clipping never makes an update more
             * attractive. */
            float x = model_reward(m, score[at]), old = row[i]->value[s], ret = row[i]->ret[s];
            float bound = x < old - range ? old - range : x > old + range ? old + range : x;
            float a = (x - ret) * (x - ret), b = (bound - ret) * (bound - ret);
            v->loss += 0.5 * (double)(a >= b ? a : b);
            v->clipped += b > a;
            ds[at] = a >= b ? (float)((double)(x - ret) * v->scale) / std : 0.0f;
        }
    model_scores_bwd(m, &t->ws, top, ds, dh);
}

/* One micro-batch through a trunk: forward, the losses that it is trained by (null: not by that
 * one), one backward pass for them. */
static void ppo_pass(rlhf_trainer *t, rlhf_model *m, roll_row *const *row, int n, ppo_policy *p,
                     ppo_value *v) {
    arena *ws = &t->ws;
    arena_mark mark = arena_save(ws);
    model_run run = ppo_batch(ws, row, n);
    model_for_training(m, ws, &run, 0, -1);
    int total, *state = ppo_states(ws, &run, row, n, v != NULL, &total);
    model_forward(m, ws, &run);
    model_top top = model_top_fwd(m, ws, run.x, state, total);
    float *dh = arena_floats(ws, (size_t)total, (size_t)m->c.d);
    if (v) ppo_value_loss(t, row, n, &top, v, dh);
    if (p) ppo_policy_loss(t, row, n, &top, p, dh, v != NULL);
    model_backward(m, ws, &run, model_top_bwd(m, ws, &top, dh, run.rows));
    arena_restore(ws, mark);
}

/* One optimizer step on n rows. Losses are means over all tokens (states) of the minibatch, whose
 * number is known before the first micro-batch, so that how these are cut changes nothing. */
static void ppo_minibatch(rlhf_trainer *t, roll_row *const *row, int n, const double *lr,
                          ppo_sums *s) {
    const rlhf_ppo_config *c = &t->u.ppo;
    arena_mark mark = arena_save(&t->ws);
    int *len = arena_alloc(&t->ws, (size_t)n * sizeof *len);
    int64_t tokens = 0, states = 0;
    for (int i = 0; i < n; i++) {
        len[i] = row[i]->n_prompt + row[i]->n;
        tokens += row[i]->n;
        states += row[i]->n_value;
    }
    ppo_policy p = {.clip = c->cliprange, .scale = 1.0 / (double)tokens};
    ppo_value v = {.range = c->cliprange_value, .scale = c->vf_coef / (double)states};
    opt_zero(t->opt);
    /* Two models, two gradients, one optimizer step; or two heads on one trunk. */
    for (int i = 0, k; i < n; i += k) {
        k = train_cut(t, len, i, n);
        ppo_pass(t, t->model, row + i, k, &p, c->shared_trunk ? &v : NULL);
        if (!c->shared_trunk) ppo_pass(t, t->value, row + i, k, NULL, &v);
    }
    train_check_loss(t, p.loss + v.loss);
    s->norm += opt_step(t->opt, lr);
    /* The first minibatch's ratio is 1 to the bit; anything else would be a defect. */
    double ratio = p.ratio / (double)tokens;
    if (!s->minibatches) s->first_ratio = ratio;
    s->policy += p.loss / (double)tokens;
    s->value += v.loss / (double)states;
    s->kl += p.kl / (double)tokens;
    s->clipped += p.clipped / (double)tokens;
    s->value_clipped += v.clipped / (double)states;
    s->entropy += p.entropy / (double)tokens;
    s->ratio += ratio;
    s->ratio_sq += ratio * ratio;
    s->minibatches++;
    arena_restore(&t->ws, mark);
}

/* num_ppo_epochs passes over the rollout, each in its own order, in num_mini_batches steps of equal
 * numbers of episodes; puts the means over all steps. */
static void ppo_optimize(rlhf_trainer *t, roll_row *const *row, int n, const double *lr) {
    const rlhf_ppo_config *c = &t->u.ppo;
    int size = n / (int)c->num_mini_batches;
    roll_row **shuffled = arena_alloc(&t->ws, (size_t)n * sizeof *shuffled);
    int *order = arena_alloc(&t->ws, (size_t)n * sizeof *order);
    ppo_sums s = {0};
    int longest = 0;
    for (int i = 0; i < n; i++) longest = base_max(longest, row[i]->n_prompt + row[i]->n);
    opt_reserve(t->opt, (int64_t)size * longest);
    for (int epoch = 0; epoch < c->num_ppo_epochs; epoch++) {
        /* A pass's order is a function of seed, step and pass. */
        uint64_t round = (uint64_t)(t->step * c->num_ppo_epochs + epoch);
        if (c->shuffle_minibatches)
            rng_permutation((uint64_t)c->seed, RNG_MINIBATCH, round, n, order);
        for (int i = 0; i < n; i++) shuffled[i] = row[c->shuffle_minibatches ? order[i] : i];
        for (int i = 0; i < n; i += size) ppo_minibatch(t, shuffled + i, size, lr, &s);
    }
    /* Means over the steps; val/ratio_var is the variance of the steps' mean ratios. */
    double k = (double)s.minibatches;
    train_put(t, "policy/approxkl_avg", s.kl / k);
    train_put(t, "policy/clipfrac_avg", s.clipped / k);
    train_put(t, "policy/entropy_avg", s.entropy / k);
    train_put(t, "loss/policy_avg", s.policy / k);
    train_put(t, "loss/value_avg", s.value / k);
    train_put(t, "val/clipfrac_avg", s.value_clipped / k);
    train_put(t, "val/ratio", s.ratio / k);
    train_put(t, "val/ratio_var",
              k > 1 ? fmax(0, (s.ratio_sq - s.ratio * s.ratio / k) / (k - 1)) : 0);
    train_put(t, "val/ratio_first", s.first_ratio);
    train_put(t, "grad_norm", s.norm / k);
}

/* One update. lr[0] is the policy's, lr[1] the value model's. */
static void ppo_step(rlhf_trainer *t) {
    const rlhf_ppo_config *c = &t->u.ppo;
    int n = (int)c->batch_size;
    roll_row *rows = ppo_rows_new(t), **row = arena_alloc(&t->ws, (size_t)n * sizeof *row);
    for (int i = 0; i < n; i++) row[i] = rows + i;
    /* Rollout: answers, what reference and value model say of them, scores, advantages. */
    ppo_generate(t, rows, n);
    ppo_each_batch(t, row, n, ppo_reference);
    ppo_each_batch(t, row, n, ppo_values);
    ppo_score(t, row, n);
    ppo_advantages(t, row, n);
    ppo_rollout_metrics(t, row, n);
    /* Optimisation. */
    double factor = opt_schedule(c->lr_scheduler_type, t->step, c->warmup_steps, t->total);
    double lr[2] = {c->learning_rate * factor, c->learning_rate * factor};
    if (c->value_learning_rate >= 0) lr[1] = c->value_learning_rate * factor;
    ppo_optimize(t, row, n, lr);
    for (int i = 0; i < n; i++) t->tokens += row[i]->n_prompt + row[i]->n;
    t->episodes += n;
    train_put(t, "lr", lr[0]);
    train_put(t, "episode", (double)t->episodes);
    /* The next update's coefficient, from this one's KL. */
    if (c->kl_target > 0) {
        double kl = 0;
        for (int i = 0; i < t->metrics; i++)
            if (!strcmp(t->metric[i].name, "objective/kl")) kl = t->metric[i].value;
        t->kl_coef = roll_adapt_kl(t->kl_coef, kl, c->kl_target, n, c->kl_horizon);
    }
}

/* Prompts and answers of full length, and what is kept of each answer until the update is over. */
static void ppo_size(const rlhf_trainer *t, train_size *z) {
    const rlhf_ppo_config *c = &t->u.ppo;
    size_t room = (size_t)c->response_length;
    train_add_sampler(t, z, t->model, (int)c->batch_size, (int)room);
    int len = z->sampler->len, most = (int)(c->batch_size / c->num_mini_batches);
    int fit = base_min(base_max(1, t->at_once / len), (int)c->per_device_train_batch_size);
    z->rows = len * base_min(fit, most);
    z->step = (int64_t)len * most;
    z->compared = (int)c->batch_size * len;
    z->scored = c->batch_size * base_max((int)c->best_of_n, 1) * len;
    z->rollout = (size_t)c->batch_size * (4 * room * (size_t)t->model->c.d + 32 * (room + 1));
}

static int ppo_compare_floats(const void *a, const void *b) {
    const float *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* The mean of the best of k out of n sorted scores, over all choices of k (unbiased for k further
 * ones): score i, from 1, is the best of C(i-1, k-1) choices out of C(n, k). */
static double ppo_mean_best(const float *score, int n, int k) {
    double share = (double)k / n, sum = 0;
    for (int i = n; i >= k; i--) {
        sum += share * (double)score[i - 1];
        share *= i > 1 ? (double)(i - k) / (i - 1) : 0;
    }
    return sum;
}

/* What the best of n = 1, 2, 4, ... answers of the starting policy scores, as a mean over
 * batch_size prompts with its standard error, at KL log n - (n-1)/n (Stiennon et al. 2020; an upper
 * bound where answers repeat): the frontier that PPO's reward at its KL is to be seen against.
 * Answers are drawn and scored as in training. Nothing with a reward function, which is called for
 * training only. */
static void ppo_best_of_n(rlhf_trainer *t) {
    const rlhf_ppo_config *c = &t->u.ppo;
    rlhf_ctx *ctx = t->ctx;
    int n = (int)c->best_of_n, prompts, room = (int)c->response_length;
    if (!n || t->fn || !train_dir(t)) return;
    arena_reset(&t->ws);
    gen_item *first = train_sample_prompts(t, (int)c->batch_size, room, &prompts);
    if (!prompts) return;
    gen_item *item = arena_alloc(&t->ws, (size_t)prompts * (size_t)n * sizeof *item);
    for (int i = 0; i < prompts * n; i++) {
        int len = first[i / n].n_prompt;
        int32_t *whole = arena_alloc(&t->ws, (size_t)(len + room) * sizeof *whole);
        memcpy(whole, first[i / n].prompt, (size_t)len * sizeof *whole);
        /* Keys far above those of episodes. */
        item[i] = (gen_item){.prompt = whole,
                             .n_prompt = len,
                             .key = ((uint64_t)1 << 48) + (uint64_t)i,
                             .out = whole + len};
    }
    gen_config g = {.max_new = room,
                    .batch = (int)c->batch_size,
                    .temperature = (float)c->temperature,
                    .top_p = 1,
                    .seed = (uint64_t)c->seed,
                    .stop = (int)c->stop_token_id};
    train_generate(t, &g, item, prompts * n);
    float *score = train_score_items(t, item, prompts * n);
    for (int i = 0; i < prompts * n; i++)
        score[i] = model_reward(t->reward, score[i]) -
                   (item[i].finished ? 0 : (float)c->missing_eos_penalty);
    for (int i = 0; i < prompts; i++)
        qsort(score + (size_t)i * (size_t)n, (size_t)n, sizeof *score, ppo_compare_floats);
    json_t *j = json_hold(ctx, json_object()), *points = json_array();
    json_object_set_new(j, "prompts", json_integer(prompts));
    json_object_set_new(j, "answers", json_integer(n));
    json_object_set_new(j, "points", points);
    for (int k = 1; k <= n; k *= 2) {
        double sum = 0, squares = 0;
        for (int i = 0; i < prompts; i++) {
            double best = ppo_mean_best(score + (size_t)i * (size_t)n, n, k);
            sum += best;
            squares += best * best;
        }
        double mean = sum / prompts, var = fmax(squares / prompts - mean * mean, 0);
        json_array_append_new(
            points, json_pack("{s:i,s:f,s:f,s:f}", "n", k, "kl", log(k) - (double)(k - 1) / k,
                              "score", mean, "error", sqrt(var / base_max(prompts - 1, 1))));
    }
    json_write_file(ctx, ckpt_path(ctx, train_dir(t), "best_of_n.json"), j);
    err_release(ctx);
}

/* What 26 needs to know of this trainer; there is no evaluation set. */
static const train_ops ppo_ops = {"ppo", RLHF_CONFIG_PPO, ppo_step, ppo_best_of_n,
                                  NULL,  NULL,            ppo_size};

/* The value model: a copy of the reward model, normalisation included (Stiennon et al. 2020), or
 * the policy's trunk with a head of zeros: a copy of it, or (shared) the trunk itself. */
static rlhf_model *ppo_value_model(rlhf_model *policy, rlhf_model *reward, int shared) {
    if (shared) return ckpt_head_for(policy);
    rlhf_model *v = ckpt_copy_model(reward ? reward : policy, RLHF_HEAD_SCORE);
    v->score_trained = 1;
    return v;
}

/* A trainer of a policy; reward or fn may be null, not both, and tok may be null if fn does without
 * texts. Clones reference and value model, which the trainer owns. */
static rlhf_trainer *ppo_open(rlhf_model *policy, rlhf_tokenizer *tok, rlhf_dataset *prompts,
                              rlhf_model *reward, rlhf_reward_fn fn, void *user,
                              const rlhf_ppo_config *config) {
    rlhf_ctx *ctx = policy->ctx;
    model_need_lm(policy);
    if (reward) model_need_score(reward);
    if (!reward && !fn)
        err_throw(ctx, RLHF_ERR_ARG, "PPO needs a reward model, a reward function, or both");
    if (prompts->config.kind != RLHF_DATA_PROMPT)
        err_throw(ctx, RLHF_ERR_ARG, "PPO needs a dataset of prompts");
    rlhf_trainer *t = train_new(policy, tok, prompts, &ppo_ops, config, sizeof *config);
    if (config->batch_size % config->num_mini_batches)
        err_throw(ctx, RLHF_ERR_ARG, "batch_size %lld is not a multiple of num_mini_batches %lld",
                  (long long)config->batch_size, (long long)config->num_mini_batches);
    /* Refused now rather than after hours. */
    for (int i = 0; i < prompts->n; i++)
        if (prompts->record[i].a.n + config->response_length > policy->c.positions)
            err_throw(ctx, RLHF_ERR_CONTEXT,
                      "prompt %d has %d tokens; with response_length %lld it exceeds the model's "
                      "%d positions",
                      i, prompts->record[i].a.n, (long long)config->response_length,
                      policy->c.positions);
    t->reward = reward;
    t->fn = fn;
    t->user = user;
    t->kl_coef = config->kl_coef;
    t->samples = (int)config->sample_prompts;
    t->sample_room = (int)config->response_length;
    t->sample_stop = (int)config->stop_token_id;
    train_set_length(t, config->batch_size);
    /* Copies before the policy changes: they share its base. */
    t->start = ckpt_copy_model(policy, RLHF_HEAD_LM);
    t->value = ppo_value_model(policy, reward, config->shared_trunk);
    t->owns_start = t->owns_value = 1;
    rlhf_model *models[2] = {policy, t->value};
    train_optimizer(t, models, 2);
    train_plan(t);
    for (int i = 0; i < 2; i++) {
        err_keep(ctx);    /* a copy */
        err_release(ctx); /* its config */
    }
    return t;
}

/* ============================================================================================
 * MARK: - 31 EVAL (eval_)
 * What a model is worth on a dataset: likelihood, KL to a reference, preference accuracy and
 * calibration overall, by any field of the records and turn by turn. Results are JSON objects.
 *
 * Slices show what a mean hides: a reward model that is right on one kind of question, or agrees
 * with one annotator, only. Nothing here changes a model.
 * Tests: test/test_api.c, test/test_rater.c
 * ============================================================================================ */

/* The exact KL(model || reference), in nats, summed over the rows of n sequences that bear loss.
 * Both models see the same tokens: KL in the states of the data, not of the model's own samples. */
static double eval_kl_pass(rlhf_model *m, rlhf_model *ref, arena *ws, const data_seq *const *seq,
                           int n) {
    arena_mark mark = arena_save(ws);
    sft_rows rows;
    model_run run = sft_batch(ws, seq, n, &rows), other = run;
    double sum = 0;
    if (rows.n) {
        model_forward(m, ws, &run);
        model_top top = model_top_fwd(m, ws, run.x, rows.row, rows.n);
        model_forward(ref, ws, &other);
        model_top top2 = model_top_fwd(ref, ws, other.x, rows.row, rows.n);
        op_weight w = model_head_weight(m, rows.n), w2 = model_head_weight(ref, rows.n);
        op_env e = {m->ctx, ws};
        op_rows out = {0};
        float *kl = arena_floats(ws, (size_t)rows.n, 1);
        op_vocab_compare(&e, &w, top.h, &w2, top2.h, rows.n, rows.target, 1.0f, &out, kl, NULL);
        for (int i = 0; i < rows.n; i++) sum += (double)kl[i];
    }
    arena_restore(ws, mark);
    return sum;
}

/* The same over n sequences, in batches. */
static double eval_kl(rlhf_model *m, rlhf_model *ref, arena *ws, const data_seq *const *seq,
                      int n) {
    int *len = arena_alloc(ws, (size_t)n * sizeof *len);
    double sum = 0;
    for (int i = 0; i < n; i++) len[i] = seq[i]->n;
    for (int i = 0, k; i < n; i += k) {
        k = model_batch_count(m, len, i, n);
        sum += eval_kl_pass(m, ref, ws, seq + i, k);
    }
    return sum;
}

/* Sums over the records of one domain, or over all. */
typedef struct eval_part {
    sft_sums sums;
    double kl;
    int records;
} eval_part;

/* The part as a JSON object; kl only where there is a reference. */
static json_t *eval_part_json(const eval_part *p, const rlhf_model *ref) {
    json_t *j = json_object();
    double n = p->sums.tokens ? (double)p->sums.tokens : 1, nll = p->sums.nll / n;
    json_object_set_new(j, "records", json_integer(p->records));
    json_object_set_new(j, "num_tokens", json_integer(p->sums.tokens));
    json_object_set_new(j, "nll", json_real(nll));
    json_object_set_new(j, "perplexity", json_real(fmin(exp(nll), 1e300)));
    json_object_set_new(j, "mean_token_accuracy", json_real((double)p->sums.hits / n));
    json_object_set_new(j, "entropy", json_real(p->sums.entropy / n));
    if (ref) json_object_set_new(j, "kl", json_real(p->kl / p->records));
    return j;
}

/* Equal texts, or both absent. */
static int eval_same(const char *a, const char *b) { return a == b || (a && b && !strcmp(a, b)); }

/* All records of the domain of record `first`, whose earlier records are of others; 0 records if
 * not. */
static eval_part eval_measure(rlhf_model *m, rlhf_model *ref, arena *ws, const rlhf_dataset *d,
                              int first) {
    const char *name = d->record[first].domain;
    const data_seq **seq = arena_alloc(ws, (size_t)d->n * sizeof *seq);
    eval_part p = {0};
    for (int i = 0; i < d->n; i++) {
        if (!eval_same(d->record[i].domain, name)) continue;
        if (i < first) return (eval_part){0};
        seq[p.records++] = &d->record[i].a;
    }
    p.sums = sft_measure(m, ws, seq, p.records);
    if (ref) p.kl = eval_kl(m, ref, ws, seq, p.records);
    return p;
}

/* Likelihood of a dataset of texts, overall and by domain; ref may be null. Held. */
static json_t *eval_text(rlhf_model *m, rlhf_model *ref, arena *ws, const rlhf_dataset *d) {
    model_need_lm(m);
    if (ref && m->c.vocab != ref->c.vocab)
        err_throw(m->ctx, RLHF_ERR_ARG, "the model has %d tokens, the reference %d", m->c.vocab,
                  ref->c.vocab);
    json_t *slices = json_hold(m->ctx, json_object());
    eval_part all = {0};
    /* Domains in the order of their first records; sums of domains are the sums of all. */
    for (int i = 0; i < d->n; i++) {
        arena_mark mark = arena_save(ws);
        eval_part p = eval_measure(m, ref, ws, d, i);
        arena_restore(ws, mark);
        if (!p.records) continue;
        all.records += p.records;
        all.kl += p.kl;
        all.sums.nll += p.sums.nll;
        all.sums.entropy += p.sums.entropy;
        all.sums.hits += p.sums.hits;
        all.sums.tokens += p.sums.tokens;
        if (d->record[i].domain)
            json_object_set_new(slices, d->record[i].domain, eval_part_json(&p, ref));
    }
    if (!all.sums.tokens) err_throw(m->ctx, RLHF_ERR_DATA, "no token of the dataset bears loss");
    json_t *j = eval_part_json(&all, ref);
    json_object_set_new(j, "dropped", json_integer(d->dropped));
    if (json_object_size(slices)) json_object_set(j, "domain", slices);
    err_release(m->ctx);
    return json_hold(m->ctx, j);
}

/* The 95 % interval of a share by Wilson (1927): hits of n, either may be a sum of fractions. */
static void eval_wilson(double hits, double n, double *low, double *high) {
    const double z = 1.959963984540054;
    double middle = (hits + z * z / 2) / (n + z * z);
    double half = z / (n + z * z) * sqrt(fmax(hits * (n - hits), 0) / n + z * z / 4);
    *low = fmax(middle - half, 0);
    *high = fmin(middle + half, 1);
}

/* A number, or null where there is none. */
static void eval_put(json_t *j, const char *name, double value) {
    json_object_set_new(j, name, isfinite(value) ? json_real(value) : json_null());
}

/* "name", "name_low" and "name_high" of a share; all null if n is 0. */
static void eval_put_share(json_t *j, const char *name, double hits, double n) {
    char bound[64];
    double low = NAN, high = NAN;
    if (n > 0) eval_wilson(hits, n, &low, &high);
    eval_put(j, name, n > 0 ? hits / n : NAN);
    snprintf(bound, sizeof bound, "%s_low", name);
    eval_put(j, bound, low);
    snprintf(bound, sizeof bound, "%s_high", name);
    eval_put(j, bound, high);
}

/* EVAL_BINS of equal width hold confidences from 0.5 to 1. */
enum { EVAL_BINS = 10, EVAL_VALUES = 64 };

/* Sums over pairs: all of them, or those with one value of a field. */
typedef struct eval_slice {
    rm_sums s;
    double longer;        /* pairs whose better answer is the longer one; ties count half */
    double agree, judged; /* agreement with other judgements of the pair, where there are */
    double sure[EVAL_BINS], hits[EVAL_BINS]; /* confidence and success by confidence */
} eval_slice;

/* All pairs of a dataset, scored. */
typedef struct eval_pairs {
    const rlhf_dataset *d;
    const float *score;  /* as rm_score_pairs gives it */
    const double *agree; /* of each pair; NaN: nobody else has judged it */
    const int *length;   /* tokens of both answers */
    int tercile[2];      /* longest pairs of the first and the second third */
    double std;          /* of the normalised reward, > 0 */
} eval_pairs;

/* Tokens that bear loss: an answer without its prompt. */
static int eval_length(const data_seq *s) {
    int n = 0;
    for (int t = 0; t < s->n; t++) n += s->loss[t];
    return n;
}

/* Adds a pair with scores a and b and answers of these lengths. */
static void eval_add(eval_slice *e, const data_record *r, double a, double b, double agree,
                     int length_a, int length_b) {
    rm_add(&e->s, r, a, b, 1);
    e->longer += rm_hit(r, length_a, length_b);
    if (!isnan(agree)) e->agree += agree, e->judged++;
    double sure = (double)v_sigmoid1((float)fabs(a - b));
    int bin = base_min((int)((sure - 0.5) * 2 * EVAL_BINS), EVAL_BINS - 1);
    e->sure[bin] += sure;
    e->hits[bin] += rm_hit(r, a, b);
}

/* Adds pair i. */
static void eval_add_pair(eval_slice *e, const eval_pairs *p, int i) {
    const data_record *r = p->d->record + i;
    eval_add(e, r, (double)p->score[2 * i], (double)p->score[2 * i + 1], p->agree[i],
             eval_length(&r->a), eval_length(&r->b));
}

/* What is reported of a slice. Expected calibration error (Naeini et al. 2015): over the bins, the
 * mean distance of confidence and success. The ceiling c of judges who are right with the same
 * chance solves agreement = c^2 + (1 - c)^2. */
static json_t *eval_slice_json(const eval_slice *e, double std) {
    double n = (double)(e->s.pairs ? e->s.pairs : 1), ece = 0;
    double agreement = e->judged > 0 ? e->agree / e->judged : NAN;
    for (int i = 0; i < EVAL_BINS; i++) ece += fabs(e->sure[i] - e->hits[i]) / n;
    json_t *j = json_object();
    json_object_set_new(j, "pairs", json_integer(e->s.pairs));
    eval_put_share(j, "accuracy", e->s.correct, (double)e->s.pairs);
    eval_put(j, "margin", e->s.margin / n / std);
    eval_put(j, "ece", ece);
    eval_put(j, "loss", e->s.loss / n);
    eval_put(j, "length_accuracy", e->longer / n);
    eval_put_share(j, "agreement", e->agree, e->judged);
    eval_put(j, "ceiling", 0.5 + 0.5 * sqrt(fmax(2 * agreement - 1, 0)));
    if (isnan(agreement)) json_object_set_new(j, "ceiling", json_null());
    return j;
}

/* The same answers to the same prompt: their number, and which of the two is chosen. */
typedef struct eval_key {
    uint64_t key;
    int i, side;
} eval_key;

static uint64_t eval_hash(const data_seq *s) {
    uint64_t h = (uint64_t)s->n;
    for (int t = 0; t < s->n; t++) h = rng_mix(h ^ (uint64_t)(uint32_t)s->ids[t]) + 1;
    return h;
}

static int eval_compare_keys(const void *a, const void *b) {
    const eval_key *x = a, *y = b;
    return x->key != y->key ? (x->key < y->key ? -1 : 1) : (x->i > y->i) - (x->i < y->i);
}

/* For each pair the share of the other judgements of it that agree; NaN where there is none. */
static double *eval_agreement(arena *ws, const rlhf_dataset *d) {
    double *agree = arena_alloc(ws, (size_t)d->n * sizeof *agree);
    eval_key *key = arena_alloc(ws, (size_t)d->n * sizeof *key);
    for (int i = 0; i < d->n; i++) {
        uint64_t a = eval_hash(&d->record[i].a), b = eval_hash(&d->record[i].b);
        key[i] = (eval_key){a + b, i, (a < b) == (d->record[i].doubt <= 0.5)};
    }
    qsort(key, (size_t)d->n, sizeof *key, eval_compare_keys);
    for (int i = 0, end; i < d->n; i = end) {
        int count[2] = {0};
        for (end = i; end < d->n && key[end].key == key[i].key; end++) count[key[end].side]++;
        for (int k = i; k < end; k++)
            agree[key[k].i] =
                end - i > 1 ? (double)(count[key[k].side] - 1) / (double)(end - i - 1) : NAN;
    }
    return agree;
}

static int eval_compare_ints(const void *a, const void *b) {
    const int *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* Lengths of all pairs, and where their thirds end. */
static void eval_terciles(arena *ws, eval_pairs *p) {
    int n = p->d->n, *length = arena_alloc(ws, 2 * (size_t)n * sizeof *length);
    for (int i = 0; i < n; i++)
        length[i] = eval_length(&p->d->record[i].a) + eval_length(&p->d->record[i].b);
    int *sorted = memcpy(length + n, length, (size_t)n * sizeof *length);
    qsort(sorted, (size_t)n, sizeof *sorted, eval_compare_ints);
    p->length = length;
    p->tercile[0] = sorted[(n - 1) / 3];
    p->tercile[1] = sorted[2 * (n - 1) / 3];
}

/* Appends the text of a scalar, unless it is null or an empty text. prefix: "member: " or "". */
static void eval_value(json_t *list, const char *prefix, const json_t *v) {
    char text[512];
    int n = 0;
    if (json_is_string(v)) {
        if (!json_string_length(v)) return;
        n = snprintf(text, sizeof text, "%s%s", prefix, json_string_value(v));
    } else if (json_is_integer(v)) {
        n = snprintf(text, sizeof text, "%s%lld", prefix, (long long)json_integer_value(v));
    } else if (json_is_real(v)) {
        n = snprintf(text, sizeof text, "%s%g", prefix, json_real_value(v));
    } else if (json_is_boolean(v)) {
        n = snprintf(text, sizeof text, "%s%s", prefix, json_is_true(v) ? "true" : "false");
    }
    if (n > 0 && json_array_size(list) < EVAL_VALUES)
        json_array_append_new(list, json_stringn_nocheck(text, strlen(text)));
}

/* Turns of the assistant in one answer: those of a conversation, or of a transcript. */
static int eval_turns(const json_t *v) {
    static const char mark[] = "\n\nAssistant:";
    int n = 0;
    size_t i;
    json_t *turn;
    if (json_is_string(v)) {
        for (const char *p = json_string_value(v); (p = strstr(p, mark)); p++) n++;
        return base_max(n, 1);
    }
    json_array_foreach((json_t *)(uintptr_t)v, i, turn) {
        const char *role = json_string_value(json_object_get(turn, "role"));
        n += role && !strcmp(role, "assistant");
    }
    return n;
}

/* The values that record i has of a field, as a list of texts. A field that no record has may be
 * one that is measured: turns, length. */
static json_t *eval_values(const eval_pairs *p, int i, const json_t *record, const char *field) {
    json_t *list = json_array(), *v = json_get(record, field), *member;
    size_t k;
    const char *key;
    char text[256];
    if (!v && !strcmp(field, "length")) {
        const char *name = p->length[i] <= p->tercile[0]   ? "short"
                           : p->length[i] <= p->tercile[1] ? "medium"
                                                           : "long";
        json_array_append_new(list, json_string(name));
    } else if (!v && !strcmp(field, "turns")) {
        json_t *prompt = json_get(record, "prompt");
        int n = eval_turns(json_get(record, "chosen"));
        if (json_is_array(prompt)) n += eval_turns(prompt);
        json_array_append_new(list, json_sprintf("%d", n));
    } else if (json_is_array(v)) {
        json_array_foreach(v, k, member) eval_value(list, "", member);
    } else if (json_is_object(v)) {
        json_object_foreach(v, key, member) {
            snprintf(text, sizeof text, "%s: ", key);
            if (json_is_true(member)) json_array_append_new(list, json_string(key));
            else if (!json_is_false(member)) eval_value(list, text, member);
        }
    } else {
        eval_value(list, "", v);
    }
    return list;
}

/* Adds "field": {value: {...}}, values in the order of their first records, unless there is none.
 * A measured field with one value tells nothing that the whole does not. */
static void eval_slices(json_t *out, const eval_pairs *p, json_t *const *record,
                        const char *field) {
    rlhf_ctx *ctx = p->d->ctx;
    json_t *index = json_hold(ctx, json_object()), *slices = json_hold(ctx, json_object());
    eval_slice *list = NULL;
    const char *name;
    json_t *v;
    int measured = !strcmp(field, "turns") || !strcmp(field, "length");
    for (int i = 0; measured && i < p->d->n; i++) measured = !json_get(record[i], field);
    for (int i = 0; i < p->d->n; i++) {
        json_t *values = json_hold(ctx, eval_values(p, i, record[i], field));
        size_t k;
        json_array_foreach(values, k, v) {
            name = json_string_value(v);
            if (!json_object_get(index, name)) {
                json_object_set_new(index, name, json_integer((json_int_t)stbds_arrlen(list)));
                stbds_arrput(list, (eval_slice){0});
            }
            eval_add_pair(list + json_integer_value(json_object_get(index, name)), p, i);
        }
        err_release(ctx);
    }
    json_object_foreach(index, name, v)
        json_object_set_new(slices, name, eval_slice_json(list + json_integer_value(v), p->std));
    if (json_object_size(slices) > (measured ? 1 : 0)) json_object_set(out, field, slices);
    stbds_arrfree(list);
    err_release(ctx);
    err_release(ctx);
}

/* Slices by every field that is always asked for, then by those that `more` lists. */
static void eval_all_slices(json_t *out, arena *ws, const eval_pairs *p, const char *more) {
    rlhf_ctx *ctx = p->d->ctx;
    static const char *const always[] = {"domain",  "annotator_type", "annotator", "safety",
                                         "culture", "turns",          "length"};
    json_t *all = json_hold(ctx, json_array());
    json_t **record = arena_alloc(ws, (size_t)p->d->n * sizeof(json_t *));
    for (int i = 0; i < p->d->n; i++) {
        record[i] = json_loads(p->d->record[i].line, JSON_ALLOW_NUL, NULL);
        if (!record[i] || json_array_append_new(all, record[i]))
            err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a JSON value");
    }
    for (size_t i = 0; i < sizeof always / sizeof *always; i++)
        eval_slices(out, p, record, always[i]);
    for (const char *at = more; *at;) {
        size_t n = strcspn(at, ",");
        char *field = mem_strndup(ctx, at, n);
        if (json_get(out, field) && !json_is_object(json_get(out, field)))
            err_throw(ctx, RLHF_ERR_ARG,
                      "slice: \"%s\" is the name of a measurement, expected a field of the records",
                      field);
        if (n && !json_get(out, field)) {
            eval_slices(out, p, record, field);
            if (!json_get(out, field))
                log_at(ctx, RLHF_LOG_WARNING, "slice: no record has a \"%s\" to report by", field);
        }
        mem_free(field);
        at += n + (at[n] == ',');
    }
    err_release(ctx);
}

/* Adds "per_turn": {k: {...}}: conversations compared where their k-th turn of the assistant ends,
 * as far as both have one and are not the same until there; lengths are those up to there. */
static void eval_per_turn(json_t *out, rlhf_model *m, arena *ws, const eval_pairs *p) {
    json_t *turns = json_object();
    char name[16];
    const int32_t **ids = arena_alloc(ws, 2 * (size_t)p->d->n * sizeof *ids);
    int *len = arena_alloc(ws, 2 * (size_t)p->d->n * sizeof *len);
    const data_record **rec = arena_alloc(ws, (size_t)p->d->n * sizeof *rec);
    float *score = arena_floats(ws, 2 * (size_t)p->d->n, 1);
    json_object_set_new(out, "per_turn", turns);
    for (int k = 0, more = 1; more; k++) {
        int n = more = 0;
        for (int i = 0; i < p->d->n; i++) {
            const data_record *r = p->d->record + i;
            if (r->a.turns <= k || r->b.turns <= k) continue;
            more = 1;
            int la = r->a.end[k], lb = r->b.end[k];
            if (la == lb && !memcmp(r->a.ids, r->b.ids, (size_t)la * sizeof *r->a.ids)) continue;
            ids[2 * n] = r->a.ids, len[2 * n] = la;
            ids[2 * n + 1] = r->b.ids, len[2 * n + 1] = lb;
            rec[n++] = r;
        }
        if (!n) continue;
        model_score_list(m, ws, 2 * n, ids, len, score);
        eval_slice e = {0};
        for (int i = 0; i < n; i++)
            eval_add(&e, rec[i], (double)score[2 * i], (double)score[2 * i + 1], NAN, len[2 * i],
                     len[2 * i + 1]);
        snprintf(name, sizeof name, "%d", k + 1);
        json_object_set_new(turns, name, eval_slice_json(&e, p->std));
    }
    if (!json_object_size(turns)) json_object_del(out, "per_turn");
}

/* Preference accuracy, overall and by slice; ties count half. Margins are in normalised rewards,
 * loss and calibration in raw scores, as in training. Held. */
static json_t *eval_preferences(rlhf_model *m, arena *ws, const rlhf_dataset *d,
                                const rlhf_eval_config *config) {
    model_need_score(m);
    eval_pairs p = {.d = d,
                    .score = rm_score_pairs(m, ws, d),
                    .agree = eval_agreement(ws, d),
                    .std = m->score_std > 1e-8f ? (double)m->score_std : 1e-8};
    eval_terciles(ws, &p);
    eval_slice all = {0};
    for (int i = 0; i < d->n; i++) eval_add_pair(&all, &p, i);
    json_t *j = json_hold(m->ctx, eval_slice_json(&all, p.std));
    json_object_set_new(j, "dropped", json_integer(d->dropped));
    eval_all_slices(j, ws, &p, config->slice);
    if (config->per_turn) eval_per_turn(j, m, ws, &p);
    return j;
}

/* Normalised rewards of a dataset of whole answers into score[records]. */
static void eval_score(rlhf_model *m, arena *ws, const rlhf_dataset *d, float *score) {
    const int32_t **ids = arena_alloc(ws, (size_t)d->n * sizeof *ids);
    int *len = arena_alloc(ws, (size_t)d->n * sizeof *len);
    for (int i = 0; i < d->n; i++) {
        ids[i] = d->record[i].a.ids;
        len[i] = d->record[i].a.n;
    }
    model_score_list(m, ws, d->n, ids, len, score);
    for (int i = 0; i < d->n; i++) score[i] = model_reward(m, score[i]);
}

/* ============================================================================================
 * MARK: - 32 RATER (rater_)
 * Annotators: who judged what, how far they agree, and whom to trust. Judgements are gathered from
 * files by what they are about: an item is a prompt with two answers. Agreement is
 * Krippendorff's alpha (nominal) and Cohen's kappa; intervals are Wilson's for shares and
 * percentiles of a bootstrap over items for the others.
 *
 * Reliability is found by expectation-maximisation (Dawid and Skene 1979). The true preference of
 * an item is latent, annotator a prefers it with chance r in domain d:
 *     E   P(item) ~ its prior times the product of r or 1 - r over its votes
 *     M   r = (s c + C) / (s + n), C the expected number of right votes among n
 * where c is the annotator's mean, itself so shrunk to the kind's, and that to the mean of all:
 * five judgements do not make an expert. The strengths s are estimated, too, from how much further
 * the groups differ than chance makes them. Votes for a tie tell of agreement, not of reliability.
 * The labels are the posteriors. A crowd and its mirror image fit equally well: ours is the
 * solution in which the majority is right more often than not.
 *
 * All is plain arithmetic without logarithms, in the order of items and judgements: the same bits
 * everywhere.
 * Entry: rater_read, rater_report, rater_labels; rater_weigh.
 * Tests: test/test_rater.c
 * ============================================================================================ */

/* Votes: for the item's first answer, for its second, for neither; no vote. */
enum {
    RATER_A = DATA_A,
    RATER_B = DATA_B,
    RATER_TIE = DATA_TIE,
    RATER_SKIP = DATA_SKIP,
    RATER_CHOICES = 3
};

enum {
    RATER_ROUNDS = 500,
    RATER_WARM = 30,  /* rounds before strengths are estimated: until then labels are vague */
    RATER_SHARED = 10 /* items that two annotators share before a kappa of theirs means anything */
};

/* Bounds on the strength of a beta prior, in judgements. An annotator may be an expert in one
 * domain and a layman elsewhere while most are the same everywhere: what holds for most must not
 * overrule what 25 judgements say. */
#define RATER_WEAKEST 1.0
#define RATER_STRONGEST 100.0
#define RATER_STRONGEST_DOMAIN 25.0
#define RATER_SEEN 0.05 /* a reward model's word is worth no more than one good annotator's */

/* One judgement. */
typedef struct rater_vote {
    int item, who, domain, value;
    int first;      /* 1: for the answer that was shown first, 0: second, -1: not known */
    int gold;       /* 1: right, 0: wrong, -1: not known */
    double seconds; /* < 0: not known */
    double agree;   /* share of the others' votes on the item that are the same; NaN: none */
} rater_vote;

/* One pair of answers. Texts are JSON. */
typedef struct rater_item {
    const char *prompt, *answer[2], *id; /* id may be null */
    int domain, from, n;                 /* its votes */
    double prior;                        /* of the first answer */
} rater_item;

typedef struct rater_who {
    const char *name;
    int kind;
} rater_who;

typedef struct rater_name {
    char *key;
    int value;
} rater_name;

/* All judgements; texts and tables are temporary blocks of the call. */
typedef struct rater_set {
    rlhf_ctx *ctx;
    rater_vote *vote;                           /* stb_ds; sorted by item once all are read */
    rater_item *item;                           /* stb_ds */
    rater_who *who;                             /* stb_ds */
    rater_name *items, *whos, *domains, *kinds; /* stb_ds: text -> number */
    int n_votes, n_items, n_whos, n_domains, n_kinds;
    int replaced, skipped, ignored[DATA_WHYS];
    data_judged judged;
    uint64_t seed;
    int replicates;
} rater_set;

/* What a record is about. */
typedef struct rater_pair {
    const char *prompt;    /* JSON: what the answers are to, an object of members as they stand */
    const char *id;        /* JSON; may be null */
    const char *answer[2]; /* JSON; chosen and rejected, or the two answers */
    const char *key;       /* the same for both orders of the answers */
    int value;             /* RATER_A: answer[0] was chosen, ... */
    int listed;            /* 1: "answers", whose order is the file's */
} rater_pair;

/* ---- reading ---- */

/* A block that lives as long as the public call. */
static void *rater_zalloc(rlhf_ctx *ctx, size_t count, size_t size) {
    return mem_temp(mem_zalloc(ctx, count ? count : 1, size));
}

/* The number of a name in a table, a new one for a new name. */
static int rater_number(rater_set *s, rater_name **table, const char *name) {
    ptrdiff_t at = stbds_shgeti(*table, name);
    if (at >= 0) return (*table)[at].value;
    int n = (int)stbds_shlen(*table);
    char *key = mem_temp(mem_strdup(s->ctx, name));
    stbds_shput(*table, key, n);
    return n;
}

/* The value as JSON text, or null for none. */
static const char *rater_dump(rlhf_ctx *ctx, const json_t *v) {
    return v ? mem_temp(json_text(ctx, v, JSON_COMPACT | JSON_SORT_KEYS, NULL)) : NULL;
}

/* What a choice says. */
static int rater_choice(const json_src *src, const json_t *j, int needed) {
    return json_get(j, "choice") || needed ? data_choice(src, j) : RATER_A;
}

/* The members that a pair's answers are answers to. */
static const char *rater_context(rlhf_ctx *ctx, const json_t *j) {
    static const char *const names[] = {"prompt",      "conversations", "messages", "system",
                                        "instruction", "input",         "query",    "question"};
    json_t *context = json_hold(ctx, json_object());
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (json_get(j, names[i])) json_object_set(context, names[i], json_get(j, names[i]));
    const char *text = rater_dump(ctx, context);
    err_release(ctx);
    return text;
}

/* Reads prompt, answers and choice. */
static rater_pair rater_read_pair(const json_src *src, const json_t *j) {
    rlhf_ctx *ctx = src->ctx;
    rater_pair p = {.prompt = rater_context(ctx, j)};
    json_t *a = json_get(j, "chosen"), *b = json_get(j, "rejected"), *list = json_get(j, "answers");
    p.listed = list && !a && !b;
    if (p.listed) {
        if (json_array_size(list) != 2) json_bad(src, "answers", list, "a list of two answers");
        a = json_array_get(list, 0), b = json_array_get(list, 1);
    }
    if (!a) json_bad(src, "chosen", a, "an answer, or \"answers\" and \"choice\"");
    if (!b) json_bad(src, "rejected", b, "an answer, or \"answers\" and \"choice\"");
    p.answer[0] = rater_dump(ctx, a);
    p.answer[1] = rater_dump(ctx, b);
    p.value = rater_choice(src, j, p.listed);
    /* Beside "chosen" a choice tells ties only: what was chosen is chosen. */
    if (!p.listed && p.value == RATER_B) p.value = RATER_A;
    int turn = strcmp(p.answer[0], p.answer[1]) > 0;
    p.id = rater_dump(ctx, json_get(j, json_get(j, "item") ? "item" : "item_id"));
    p.key = mem_temp(mem_printf(ctx, "%s\n%s\n%s\n%s", p.id ? p.id : "", p.prompt, p.answer[turn],
                                p.answer[!turn]));
    return p;
}

/* The item of a pair, a new one for new texts. A new item's first answer is the file's where it
 * lists answers, else drawn from the texts: "chosen" first would make every vote one for the
 * first. */
static int rater_item_of(rater_set *s, const rater_pair *p) {
    int n = rater_number(s, &s->items, p->key);
    if (n < (int)stbds_arrlen(s->item)) return n;
    uint64_t h[2] = {0, 0};
    for (int k = 0; k < 2; k++)
        for (const char *c = p->answer[k]; *c; c++) h[k] = rng_mix(h[k] ^ (unsigned char)*c) + 1;
    int turn = !p->listed && h[0] > h[1];
    stbds_arrput(s->item, ((rater_item){.prompt = p->prompt,
                                        .id = p->id,
                                        .answer = {p->answer[turn], p->answer[!turn]},
                                        .prior = 0.5}));
    return n;
}

/* Whether the answer that the judgement chose was shown first, from "order"; -1: not known. */
static int rater_first(const json_src *src, const json_t *j, int value) {
    json_t *order = json_opt_array(src, j, "order");
    if (!order || value > RATER_B) return -1;
    int shown = data_side(json_array_get(order, 0));
    if (json_array_size(order) != 2 || shown < 0 ||
        data_side(json_array_get(order, 1)) != 1 - shown)
        json_bad(src, "order", order, "[0, 1] or [1, 0]");
    return shown == value;
}

/* Whether the judgement is right, from "gold"; -1: not known. */
static int rater_gold(const json_src *src, const json_t *j, int value) {
    const json_t *gold = json_get(j, "gold");
    if (!gold) return -1;
    if (json_is_boolean(gold)) return json_is_true(gold);
    if (data_side(gold) < 0) json_bad(src, "gold", gold, "0, 1, \"A\", \"B\", true or false");
    return data_side(gold) == value;
}

/* Reads one judgement. */
static void rater_read_record(rater_set *s, const json_src *src, json_t *j) {
    if (!json_is_object(j)) json_bad(src, "record", j, "an object");
    int why = data_judge(&s->judged, src, j);
    if (why >= 0) s->ignored[why]++;
    if (why >= 0) return;
    const char *who = json_need_str(src, j, "annotator");
    const char *kind = json_opt_str(src, j, "annotator_type", json_opt_str(src, j, "kind", "-"));
    rater_pair p = rater_read_pair(src, j);
    rater_vote v = {.value = p.value, .seconds = json_opt_real(src, j, "seconds", -1)};
    if (json_get(j, "seconds") && !(v.seconds >= 0))
        json_bad(src, "seconds", json_get(j, "seconds"), "a number not below 0");
    v.first = rater_first(src, j, p.value);
    v.gold = rater_gold(src, j, p.value);
    if (p.value == RATER_SKIP) {
        s->skipped++;
        return;
    }
    v.domain = rater_number(s, &s->domains, json_opt_str(src, j, "domain", "-"));
    v.item = rater_item_of(s, &p);
    rater_item *item = s->item + v.item;
    if (!item->n++) item->domain = v.domain;
    if (v.value != RATER_TIE && strcmp(p.answer[0], item->answer[0])) v.value = 1 - v.value;
    v.who = rater_number(s, &s->whos, who);
    if (v.who == (int)stbds_arrlen(s->who))
        stbds_arrput(s->who, ((rater_who){s->whos[v.who].key, rater_number(s, &s->kinds, kind)}));
    stbds_arrput(s->vote, v);
}

/* Calls read for every record of JSON lines, or of one JSON array. */
static void rater_each(rater_set *s, const char *name, const char *text, size_t len,
                       void (*read)(rater_set *, const json_src *, json_t *)) {
    json_src src = json_source(s->ctx, name);
    src.status = RLHF_ERR_DATA;
    const char *end = text + len, *p;
    if (len >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) text += 3; /* a byte order mark */
    p = text + strspn(text, " \t\r\n");
    if (p < end && *p == '[') {
        size_t i;
        json_t *list = json_parse(&src, p, (size_t)(end - p)), *item;
        char at[512];
        json_array_foreach(list, i, item) {
            snprintf(at, sizeof at, "%s[%zu]", name, i);
            src.file = at;
            read(s, &src, item);
        }
        err_release(s->ctx);
        return;
    }
    p = text;
    for (src.line = 1; p < end; src.line++) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        if (p + strspn(p, " \t\r") < stop) {
            read(s, &src, json_parse(&src, p, (size_t)(stop - p)));
            err_release(s->ctx);
        }
        p = stop + 1;
    }
}

/* The same for a file, plain or gzip. */
static void rater_each_in(rater_set *s, const char *path,
                          void (*read)(rater_set *, const json_src *, json_t *)) {
    size_t len;
    char *text = io_read(s->ctx, path, IO_LIMIT, &len);
    rater_each(s, path, text, len, read);
    mem_free(text);
}

/* Each item's votes together, in the order of reading, of one annotator only the last; then how far
 * each agrees with the others'. */
static void rater_sort(rater_set *s) {
    int n = (int)stbds_arrlen(s->vote), at = 0;
    s->n_items = (int)stbds_arrlen(s->item);
    s->n_whos = (int)stbds_arrlen(s->who);
    s->n_domains = (int)stbds_shlen(s->domains);
    s->n_kinds = (int)stbds_shlen(s->kinds);
    rater_vote *sorted = rater_zalloc(s->ctx, (size_t)n, sizeof *sorted);
    int *last = rater_zalloc(s->ctx, (size_t)s->n_whos, sizeof *last);
    for (int i = 0; i < s->n_items; i++) {
        s->item[i].from = at;
        at += s->item[i].n;
        s->item[i].n = 0;
    }
    for (int i = 0; i < n; i++) {
        rater_item *item = s->item + s->vote[i].item;
        sorted[item->from + item->n++] = s->vote[i];
    }
    /* last[who]: 1 + the place of their vote on this item; places only grow. */
    at = 0;
    for (int i = 0; i < s->n_items; i++) {
        rater_item *item = s->item + i;
        int from = at, count[RATER_CHOICES] = {0};
        for (int k = item->from; k < item->from + item->n; k++) {
            int *place = last + sorted[k].who;
            if (*place > from) s->vote[*place - 1] = sorted[k], s->replaced++;
            else s->vote[at] = sorted[k], *place = ++at;
        }
        item->from = from;
        item->n = at - from;
        for (int k = from; k < at; k++) count[s->vote[k].value]++;
        for (int k = from; k < at; k++)
            s->vote[k].agree =
                item->n > 1 ? (double)(count[s->vote[k].value] - 1) / (item->n - 1) : NAN;
    }
    s->n_votes = at;
}

/* Gives the tables back; texts go with the call. */
static void rater_free(rater_set *s) {
    stbds_arrfree(s->vote);
    stbds_arrfree(s->item);
    stbds_arrfree(s->who);
    stbds_shfree(s->items);
    stbds_shfree(s->whos);
    stbds_shfree(s->domains);
    stbds_shfree(s->kinds);
}

/* Reads the judgements of all files. */
static void rater_read(rater_set *s, const char *const *paths, int n) {
    s->judged.aspects = json_hold(s->ctx, json_object());
    for (int i = 0; i < n; i++) rater_each_in(s, paths[i], rater_read_record);
    data_need_aspect(&s->judged, s->ctx, paths[0]);
    if (!stbds_arrlen(s->vote))
        err_throw(s->ctx, RLHF_ERR_DATA, "%s: no judgements%s", paths[0],
                  s->ignored[DATA_UNQUALIFIED] ? " of somebody qualified" : "");
    err_release(s->ctx);
    rater_sort(s);
}

/* ---- reliability ---- */

/* Estimates. */
typedef struct rater_fit {
    double *p;          /* [items] that the first answer is the better one */
    double *who, *cell; /* [whos], [whos * domains]: reliability */
    double *mass,
        *base;          /* what a cell's judgements are worth, with the prior's; the prior's mean */
    double *n;          /* [whos * domains] judgements */
    double mean, *kind; /* of all; [kinds] */
    int rounds;
} rater_fit;

/* Counts of a group of judgements: all, expected to be right, and the variance of that. */
typedef struct rater_count {
    double n, right, var;
} rater_count;

static rater_fit rater_fit_new(const rater_set *s) {
    size_t cells = (size_t)s->n_whos * (size_t)s->n_domains;
    rater_fit f = {.p = rater_zalloc(s->ctx, (size_t)s->n_items, sizeof(double)),
                   .who = rater_zalloc(s->ctx, (size_t)s->n_whos, sizeof(double)),
                   .kind = rater_zalloc(s->ctx, (size_t)s->n_kinds, sizeof(double)),
                   .cell = rater_zalloc(s->ctx, 4 * cells, sizeof(double))};
    f.mass = f.cell + cells;
    f.base = f.mass + cells;
    f.n = f.base + cells;
    return f;
}

/* Strength of the beta prior from which groups with means base[i] are drawn, by moments of the
 * beta-binomial: the expectation of (C - n m)^2 is n m (1 - m) (1 + (n - 1) rho), s = 1 / rho - 1.
 * C is uncertain, too: its variance is part of the square. */
static double rater_strength(int n, const rater_count *c, const double *base, double most) {
    double excess = 0, scale = 0;
    for (int i = 0; i < n; i++) {
        double off = c[i].right - c[i].n * base[i], var = c[i].n * base[i] * (1 - base[i]);
        excess += off * off + c[i].var - var;
        scale += var * (c[i].n - 1);
    }
    double s = excess > 0 && scale > 0 ? scale / excess - 1 : most;
    return s < RATER_WEAKEST ? RATER_WEAKEST : s > most ? most : s;
}

/* Sums cells into annotators, annotators into kinds. */
static void rater_add(rater_count *to, const rater_count *c) {
    to->n += c->n;
    to->right += c->right;
    to->var += c->var;
}

/* The reliabilities from expected counts [cells]; groups: room for [whos + kinds] counts and
 * [whos] means. */
static void rater_maximize(const rater_set *s, rater_fit *f, const rater_count *cell,
                           rater_count *groups, double *base) {
    int whos = s->n_whos, domains = s->n_domains, warm = f->rounds < RATER_WARM;
    rater_count *who = groups, *kind = groups + whos, all = {2, 1, 0};
    memset(groups, 0, (size_t)(whos + s->n_kinds) * sizeof *groups);
    for (int w = 0; w < whos; w++) {
        for (int d = 0; d < domains; d++) rater_add(who + w, cell + w * domains + d);
        rater_add(kind + s->who[w].kind, who + w);
        rater_add(&all, who + w);
    }
    f->mean = all.right / all.n;
    /* Kinds are few: their prior is fixed. */
    for (int k = 0; k < s->n_kinds; k++)
        f->kind[k] = (10 * f->mean + kind[k].right) / (10 + kind[k].n);
    for (int w = 0; w < whos; w++) base[w] = f->kind[s->who[w].kind];
    double strength = warm ? 6 : rater_strength(whos, who, base, RATER_STRONGEST);
    for (int w = 0; w < whos; w++)
        f->who[w] = (strength * base[w] + who[w].right) / (strength + who[w].n);
    for (int i = 0; i < whos * domains; i++) f->base[i] = f->who[i / domains];
    strength = warm ? 10 : rater_strength(whos * domains, cell, f->base, RATER_STRONGEST_DOMAIN);
    for (int i = 0; i < whos * domains; i++) {
        double r = (strength * f->base[i] + cell[i].right) / (strength + cell[i].n);
        /* Judgements of items whose truth is in doubt tell less: what a latent truth takes from the
         * information of n judgements (Louis 1982) is var / (r (1 - r)) of them. */
        f->mass[i] = strength + fmax(cell[i].n - cell[i].var / (r * (1 - r)), 0);
        f->cell[i] = r;
        f->n[i] = cell[i].n;
    }
}

/* P(the first answer is better) of every item, from the votes of all annotators but `without`.
 * Returns the largest change. */
static double rater_expect(const rater_set *s, rater_fit *f, int without) {
    double most = 0;
    for (int i = 0; i < s->n_items; i++) {
        const rater_item *item = s->item + i;
        double a = item->prior, b = 1 - a;
        for (int k = item->from; k < item->from + item->n; k++) {
            const rater_vote *v = s->vote + k;
            if (v->value == RATER_TIE || v->who == without) continue;
            double r = f->cell[v->who * s->n_domains + v->domain];
            a *= v->value == RATER_A ? r : 1 - r;
            b *= v->value == RATER_A ? 1 - r : r;
            /* Normed at every step: no product of many votes underflows. */
            double sum = a + b;
            a /= sum, b /= sum;
        }
        most = fmax(most, fabs(a - f->p[i]));
        f->p[i] = a;
    }
    return most;
}

/* Shares of the votes for each first answer, without one annotator's (-1: with all): where the
 * search begins, and what it is compared with. */
static void rater_vote_shares(const rater_set *s, double *p, int without) {
    for (int i = 0; i < s->n_items; i++) {
        const rater_item *item = s->item + i;
        double sum = 0;
        int n = 0;
        for (int k = item->from; k < item->from + item->n; k++) {
            if (s->vote[k].who == without) continue;
            sum += s->vote[k].value == RATER_A ? 1 : s->vote[k].value == RATER_TIE ? 0.5 : 0;
            n++;
        }
        p[i] = n ? sum / n : 0.5;
    }
}

/* Expectation-maximisation without the votes of one annotator (-1: with all). */
static void rater_estimate(const rater_set *s, rater_fit *f, int without) {
    size_t cells = (size_t)s->n_whos * (size_t)s->n_domains,
           groups = (size_t)(s->n_whos + s->n_kinds);
    rater_count *cell = mem_zalloc(s->ctx, cells + groups, sizeof *cell);
    double *base = mem_zalloc(s->ctx, (size_t)s->n_whos, sizeof *base);
    rater_vote_shares(s, f->p, without);
    for (f->rounds = 0; f->rounds < RATER_ROUNDS; f->rounds++) {
        memset(cell, 0, cells * sizeof *cell);
        for (int k = 0; k < s->n_votes; k++) {
            const rater_vote *v = s->vote + k;
            if (v->value == RATER_TIE || v->who == without) continue;
            double p = f->p[v->item];
            rater_add(cell + v->who * s->n_domains + v->domain,
                      &(rater_count){1, v->value == RATER_A ? p : 1 - p, p * (1 - p)});
        }
        rater_maximize(s, f, cell, cell + cells, base);
        if (rater_expect(s, f, without) < 1e-9 && f->rounds > RATER_WARM) break;
    }
    mem_free(cell);
    mem_free(base);
}

/* ---- agreement ---- */

/* An item in a bootstrap: its part of the sums of alpha, and its pairs of votes. */
typedef struct rater_unit {
    double off, n[RATER_CHOICES]; /* disagreeing pairs / (votes - 1); votes */
    int from, pairs;
} rater_unit;

/* One item judged by two annotators: which two (their number), and what they said. */
typedef struct rater_both {
    int who, said;
} rater_both;

/* The votes of a group: those that the mask holds. */
typedef struct rater_group {
    rater_unit *unit; /* items with two votes or more */
    rater_both *both; /* stb_ds */
    int units, couples;
    double *table; /* [couples][choices * choices] */
} rater_group;

typedef struct rater_couple {
    uint64_t key;
    int value;
} rater_couple;

/* Gathers what alpha and kappa need of the votes with mask[k] != 0. */
static rater_group rater_gather(const rater_set *s, const uint8_t *mask) {
    rater_group g = {.unit = mem_zalloc(s->ctx, (size_t)s->n_items + 1, sizeof *g.unit)};
    rater_couple *couples = NULL;
    for (int i = 0; i < s->n_items; i++) {
        const rater_item *item = s->item + i;
        rater_unit u = {.from = (int)stbds_arrlen(g.both)};
        double m = 0;
        for (int k = item->from; k < item->from + item->n; k++) {
            if (!mask[k]) continue;
            u.n[s->vote[k].value]++, m++;
            for (int l = item->from; l < k; l++) {
                if (!mask[l]) continue;
                const rater_vote *a = s->vote + l, *b = s->vote + k;
                if (a->who > b->who) a = s->vote + k, b = s->vote + l;
                uint64_t key = (uint64_t)a->who << 32 | (uint64_t)b->who;
                ptrdiff_t at = stbds_hmgeti(couples, key);
                int number = at < 0 ? g.couples++ : couples[at].value;
                if (at < 0) stbds_hmput(couples, key, number);
                stbds_arrput(g.both, ((rater_both){number, a->value * RATER_CHOICES + b->value}));
            }
        }
        if (m < 2) continue;
        for (int c = 0; c < RATER_CHOICES; c++) u.off += u.n[c] * (m - u.n[c]) / (m - 1);
        u.pairs = (int)stbds_arrlen(g.both) - u.from;
        g.unit[g.units++] = u;
    }
    stbds_hmfree(couples);
    g.table =
        mem_zalloc(s->ctx, (size_t)g.couples * RATER_CHOICES * RATER_CHOICES + 1, sizeof *g.table);
    return g;
}

static void rater_ungather(rater_group *g) {
    stbds_arrfree(g->both);
    mem_free(g->unit);
    mem_free(g->table);
}

/* Unit i of a sample: of replicate 0 the unit itself, else one drawn with replacement. */
static int rater_draw(uint64_t seed, int replicate, int i, int n) {
    if (!replicate) return i;
    uint64_t r = rng_u64(seed, (uint64_t)replicate, (uint64_t)i);
    return (int)(((rng_u128)r * (unsigned)n) >> 64);
}

/* Krippendorff's alpha for nominal data (Krippendorff 2011): 1 - observed / expected disagreement,
 *     D_o = sum over items of pairs that differ / (votes - 1)
 *     D_e = pairs of all votes that differ / (all votes - 1)
 * NaN where nothing was, or could have been, disagreed about. */
static double rater_alpha(const rater_group *g, uint64_t seed, int replicate) {
    double off = 0, n[RATER_CHOICES] = {0}, all = 0, expected = 0;
    for (int i = 0; i < g->units; i++) {
        const rater_unit *u = g->unit + rater_draw(seed, replicate, i, g->units);
        off += u->off;
        for (int c = 0; c < RATER_CHOICES; c++) n[c] += u->n[c];
    }
    for (int c = 0; c < RATER_CHOICES; c++) all += n[c];
    for (int c = 0; c < RATER_CHOICES; c++) expected += n[c] * (all - n[c]);
    return expected > 0 ? 1 - (all - 1) * off / expected : NAN;
}

/* Cohen's kappa (1960), (p_o - p_e) / (1 - p_e) with p_e from each annotator's own shares: the mean
 * over couples with enough common items, weighted by their number. NaN where there is none. */
static double rater_kappa(const rater_group *g, uint64_t seed, int replicate) {
    double sum = 0, weight = 0;
    const int size = RATER_CHOICES * RATER_CHOICES;
    memset(g->table, 0, (size_t)(g->couples * size) * sizeof *g->table);
    for (int i = 0; i < g->units; i++) {
        const rater_unit *u = g->unit + rater_draw(seed, replicate, i, g->units);
        for (int k = u->from; k < u->from + u->pairs; k++)
            g->table[g->both[k].who * size + g->both[k].said]++;
    }
    for (int i = 0; i < g->couples; i++) {
        const double *t = g->table + i * size;
        double n = 0, same = 0, chance = 0;
        for (int c = 0; c < size; c++) n += t[c];
        for (int c = 0; c < RATER_CHOICES; c++) {
            double row = 0, column = 0;
            for (int d = 0; d < RATER_CHOICES; d++)
                row += t[c * RATER_CHOICES + d], column += t[d * RATER_CHOICES + c];
            same += t[c * RATER_CHOICES + c];
            chance += row * column;
        }
        if (n < RATER_SHARED || chance >= n * n) continue;
        sum += n * (same * n - chance) / (n * n - chance);
        weight += n;
    }
    return weight > 0 ? sum / weight : NAN;
}

static int rater_compare(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* Puts a value with the 2.5 and 97.5 percentiles of its n replicates; those that are not numbers do
 * not count. Sorts them. */
static void rater_put(json_t *j, const char *name, double value, double *replicate, int n) {
    char bound[64];
    int m = 0;
    for (int i = 0; i < n; i++)
        if (isfinite(replicate[i])) replicate[m++] = replicate[i];
    qsort(replicate, (size_t)m, sizeof *replicate, rater_compare);
    int known = m > 0 && isfinite(value);
    eval_put(j, name, value);
    snprintf(bound, sizeof bound, "%s_low", name);
    eval_put(j, bound, known ? replicate[(int)(0.025 * (m - 1) + 0.5)] : NAN);
    snprintf(bound, sizeof bound, "%s_high", name);
    eval_put(j, bound, known ? replicate[(int)(0.975 * (m - 1) + 0.5)] : NAN);
}

/* Median of the n sorted numbers x, or of a sample of them; count[n] is room. */
static double rater_median(const double *x, int n, int *count, uint64_t seed, int replicate) {
    int seen = 0, low = (n - 1) / 2, high = n / 2;
    double a = NAN;
    if (!n) return NAN;
    memset(count, 0, (size_t)n * sizeof *count);
    for (int i = 0; i < n; i++) count[rater_draw(seed, replicate, i, n)]++;
    for (int i = 0; i < n; i++) {
        if (seen <= low && low < seen + count[i]) a = x[i];
        if (seen <= high && high < seen + count[i]) return (a + x[i]) / 2;
        seen += count[i];
    }
    return NAN;
}

/* ---- report ---- */

/* Puts alpha and kappa of a group. */
static void rater_put_agreement(const rater_set *s, json_t *j, const uint8_t *mask, uint64_t seed,
                                double *replicate) {
    rater_group g = rater_gather(s, mask);
    double alpha = rater_alpha(&g, seed, 0), kappa = rater_kappa(&g, seed, 0);
    for (int i = 0; i < s->replicates; i++) replicate[i] = rater_alpha(&g, seed, i + 1);
    rater_put(j, "alpha", alpha, replicate, s->replicates);
    for (int i = 0; i < s->replicates; i++) replicate[i] = rater_kappa(&g, seed, i + 1);
    rater_put(j, "kappa", kappa, replicate, s->replicates);
    rater_ungather(&g);
}

/* Puts the median of the seconds in a group. */
static void rater_put_seconds(const rater_set *s, json_t *j, const uint8_t *mask, uint64_t seed,
                              double *replicate) {
    double *x = mem_zalloc(s->ctx, (size_t)s->n_votes + 1, sizeof *x);
    int *count = mem_zalloc(s->ctx, (size_t)s->n_votes + 1, sizeof *count), n = 0;
    for (int k = 0; k < s->n_votes; k++)
        if (mask[k] && s->vote[k].seconds >= 0) x[n++] = s->vote[k].seconds;
    qsort(x, (size_t)n, sizeof *x, rater_compare);
    for (int i = 0; i < s->replicates; i++) replicate[i] = rater_median(x, n, count, seed, i + 1);
    rater_put(j, "seconds", rater_median(x, n, count, seed, 0), replicate, s->replicates);
    mem_free(count);
    mem_free(x);
}

/* What is told of a group of votes; together: whether it is one of several annotators. row numbers
 * the groups, so that each draws its own samples. */
static json_t *rater_row(const rater_set *s, const rater_fit *f, const uint8_t *mask, int row,
                         int together) {
    double n = 0, agree = 0, others = 0, gold = 0, golds = 0, first = 0, shown = 0, right = 0,
           votes = 0, mass = 0;
    int items = 0;
    for (int k = 0, last = -1; k < s->n_votes; k++) {
        const rater_vote *v = s->vote + k;
        if (!mask[k]) continue;
        n++;
        items += v->item != last;
        last = v->item;
        if (!isnan(v->agree)) agree += v->agree, others++;
        if (v->gold >= 0) gold += v->gold, golds++;
        if (v->first >= 0) first += v->first, shown++;
        if (v->value == RATER_TIE) continue;
        /* Each vote bears its share of the prior: the interval knows of it as of judgements. */
        int cell = v->who * s->n_domains + v->domain;
        right += f->cell[cell], votes++;
        mass += f->mass[cell] / f->n[cell];
    }
    uint64_t seed = rng_u64(s->seed, RNG_BOOTSTRAP, (uint64_t)row);
    double *replicate = mem_zalloc(s->ctx, (size_t)s->replicates + 1, sizeof *replicate);
    json_t *j = json_hold(s->ctx, json_object());
    json_object_set_new(j, "judgements", json_integer((json_int_t)n));
    json_object_set_new(j, "items", json_integer(items));
    eval_put_share(j, "agreement", agree, others);
    if (together) rater_put_agreement(s, j, mask, seed, replicate);
    eval_put_share(j, "gold", gold, golds);
    eval_put_share(j, "first", first, shown);
    rater_put_seconds(s, j, mask, seed, replicate);
    eval_put_share(j, "reliability", votes > 0 ? right / votes * mass : 0, mass);
    mem_free(replicate);
    err_keep(s->ctx);
    return j;
}

/* The value of a vote in the column that a group is made by. */
enum { RATER_BY_DOMAIN, RATER_BY_KIND, RATER_BY_WHO };
static int rater_column(const rater_set *s, const rater_vote *v, int by) {
    if (by == RATER_BY_DOMAIN) return v->domain;
    return by == RATER_BY_KIND ? s->who[v->who].kind : v->who;
}

/* Rows by one column: {value: {...}}. Absent values are one more, "-". *row counts all rows. */
static json_t *rater_rows(const rater_set *s, const rater_fit *f, int by, const rater_name *names,
                          int n, int *row) {
    json_t *out = json_hold(s->ctx, json_object());
    uint8_t *mask = mem_zalloc(s->ctx, (size_t)s->n_votes + 1, 1);
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < s->n_votes; k++) mask[k] = rater_column(s, s->vote + k, by) == i;
        json_object_set_new(out, names[i].key, rater_row(s, f, mask, ++*row, by != RATER_BY_WHO));
    }
    mem_free(mask);
    err_keep(s->ctx);
    return out;
}

/* {annotator: {domain: {judgements, reliability, weight}}}; weight: the log-odds by which a vote
 * counts. */
static json_t *rater_cells(const rater_set *s, const rater_fit *f) {
    json_t *out = json_object();
    for (int w = 0; w < s->n_whos; w++) {
        json_t *who = json_object();
        for (int d = 0; d < s->n_domains; d++) {
            int cell = w * s->n_domains + d;
            if (f->n[cell] <= 0) continue;
            json_t *j = json_object();
            double r = f->cell[cell];
            json_object_set_new(j, "judgements", json_integer((json_int_t)f->n[cell]));
            eval_put_share(j, "reliability", r * f->mass[cell], f->mass[cell]);
            eval_put(j, "weight", (double)v_log1((float)(r / (1 - r))));
            json_object_set_new(who, s->domains[d].key, j);
        }
        json_object_set_new(out, s->who[w].name, who);
    }
    return out;
}

/* A text of the set as JSON again. */
static json_t *rater_value(const char *text) {
    return text ? json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL) : json_null();
}

/* The prompt of an item, or all that its answers are to. */
static json_t *rater_prompt(const rater_item *item) {
    json_t *context = rater_value(item->prompt), *prompt = json_object_get(context, "prompt");
    if (!prompt) return context;
    json_incref(prompt);
    json_decref(context);
    return prompt;
}

/* Votes for the first, the second and neither answer of an item. */
static void rater_tally(const rater_set *s, int item, int count[RATER_CHOICES]) {
    memset(count, 0, RATER_CHOICES * sizeof *count);
    for (int k = 0; k < s->item[item].n; k++) count[s->vote[s->item[item].from + k].value]++;
}

/* How much an item is disputed, and which. */
typedef struct rater_dispute {
    double off;
    int n, item;
} rater_dispute;

static int rater_compare_disputes(const void *a, const void *b) {
    const rater_dispute *x = a, *y = b;
    if (x->off != y->off) return x->off > y->off ? -1 : 1;
    return x->n != y->n ? y->n - x->n : (x->item > y->item) - (x->item < y->item);
}

/* The items on which most pairs of votes differ, those with more votes first. */
static json_t *rater_disputed(const rater_set *s, const rater_fit *f, int most) {
    rater_dispute *list = rater_zalloc(s->ctx, (size_t)s->n_items, sizeof *list);
    json_t *out = json_array();
    int n = 0, count[RATER_CHOICES];
    for (int i = 0; i < s->n_items; i++) {
        double m = s->item[i].n, same = 0;
        rater_tally(s, i, count);
        for (int c = 0; c < RATER_CHOICES; c++) same += (double)count[c] * (count[c] - 1);
        if (m > 1 && same < m * (m - 1))
            list[n++] = (rater_dispute){1 - same / (m * (m - 1)), s->item[i].n, i};
    }
    qsort(list, (size_t)n, sizeof *list, rater_compare_disputes);
    for (int i = 0; i < n && i < most; i++) {
        const rater_item *item = s->item + list[i].item;
        rater_tally(s, list[i].item, count);
        json_array_append_new(
            out, json_pack("{s:f,s:[i,i,i],s:f,s:s,s:o,s:o,s:[o,o]}", "disagreement", list[i].off,
                           "votes", count[0], count[1], count[2], "probability", f->p[list[i].item],
                           "domain", s->domains[item->domain].key, "item", rater_value(item->id),
                           "prompt", rater_prompt(item), "answers", rater_value(item->answer[0]),
                           rater_value(item->answer[1])));
    }
    return out;
}

/* How well each annotator's votes are told from the others': by majority and by reliability; where
 * either is undecided it counts half. Only items that others have judged, no ties. */
static json_t *rater_predict(const rater_set *s) {
    json_t *out = json_hold(s->ctx, json_object());
    rater_fit f = rater_fit_new(s);
    double *share = rater_zalloc(s->ctx, (size_t)s->n_items, sizeof *share), *p[2] = {share, f.p};
    double all[3] = {0};
    for (int w = 0; w <= s->n_whos; w++) {
        double sum[3] = {0};
        if (w < s->n_whos) {
            rater_estimate(s, &f, w);
            rater_vote_shares(s, share, w);
        }
        for (int k = 0; w < s->n_whos && k < s->n_votes; k++) {
            const rater_vote *v = s->vote + k;
            if (v->who != w || v->value == RATER_TIE || s->item[v->item].n < 2) continue;
            for (int m = 0; m < 2; m++) {
                double x = p[m][v->item] - 0.5;
                sum[m] += x == 0 ? 0.5 : (x > 0) == (v->value == RATER_A);
            }
            sum[2]++;
        }
        for (int m = 0; m < 3; m++) all[m] += sum[m];
        json_t *j = json_object();
        const double *told = w < s->n_whos ? sum : all;
        json_object_set_new(j, "judgements", json_integer((json_int_t)told[2]));
        eval_put_share(j, "majority", told[0], told[2]);
        eval_put_share(j, "em", told[1], told[2]);
        json_object_set_new(out, w < s->n_whos ? s->who[w].name : "all of them", j);
    }
    err_keep(s->ctx);
    return out;
}

/* Everything about a set, held. */
static json_t *rater_report(const rater_set *s, const rater_fit *f,
                            const rlhf_raters_config *config) {
    int row = 0, ties = 0;
    for (int k = 0; k < s->n_votes; k++) ties += s->vote[k].value == RATER_TIE;
    uint8_t *all = rater_zalloc(s->ctx, (size_t)s->n_votes + 1, 1);
    memset(all, 1, (size_t)s->n_votes);
    json_t *j = json_hold(s->ctx, rater_row(s, f, all, row, 1));
    json_object_set_new(j, "annotators", json_integer(s->n_whos));
    json_object_set_new(j, "ties", json_integer(ties));
    json_object_set_new(j, "skipped", json_integer(s->skipped));
    json_object_set_new(j, "replaced", json_integer(s->replaced));
    json_object_set_new(j, "unqualified", json_integer(s->ignored[DATA_UNQUALIFIED]));
    json_object_set_new(j, "other_aspect", json_integer(s->ignored[DATA_OTHER_ASPECT]));
    json_object_set_new(j, "rounds", json_integer(f->rounds));
    json_object_set_new(j, "domain",
                        rater_rows(s, f, RATER_BY_DOMAIN, s->domains, s->n_domains, &row));
    json_object_set_new(j, "annotator_type",
                        rater_rows(s, f, RATER_BY_KIND, s->kinds, s->n_kinds, &row));
    json_object_set_new(j, "annotator", rater_rows(s, f, RATER_BY_WHO, s->whos, s->n_whos, &row));
    if (config->leave_out) json_object_set_new(j, "prediction", rater_predict(s));
    json_object_set_new(j, "reliabilities", rater_cells(s, f));
    json_object_set_new(j, "disputed", rater_disputed(s, f, (int)config->disputed));
    return j;
}

/* ---- labels ---- */

/* One preference record for each item, as JSON lines: what EM believes to be the better answer as
 * chosen, how sure it is, and a weight. A block. */
static char *rater_labels(const rater_set *s, const rater_fit *f) {
    tok_buf b = {.ctx = s->ctx};
    tok_put(&b, "", 0);
    for (int i = 0; i < s->n_items; i++) {
        const rater_item *item = s->item + i;
        int turn = f->p[i] < 0.5, count[RATER_CHOICES];
        rater_tally(s, i, count);
        json_t *j =
            json_hold(s->ctx, json_pack("{s:o,s:o,s:f,s:f,s:[i,i,i]}", "chosen",
                                        rater_value(item->answer[turn]), "rejected",
                                        rater_value(item->answer[!turn]), "soft_label",
                                        turn ? 1 - f->p[i] : f->p[i], "weight", 1.0, "votes",
                                        count[turn], count[!turn], count[RATER_TIE]));
        json_t *context = json_hold(s->ctx, rater_value(item->prompt));
        json_object_update_missing(j, context);
        err_release(s->ctx);
        if (item->id) json_object_set_new(j, "item", rater_value(item->id));
        if (strcmp(s->domains[item->domain].key, "-"))
            json_object_set_new(j, "domain", json_string(s->domains[item->domain].key));
        size_t n;
        char *line = json_text(s->ctx, j, JSON_COMPACT, &n);
        tok_put(&b, line, n);
        tok_put(&b, "\n", 1);
        mem_free(line);
        err_release(s->ctx);
    }
    return b.p;
}

/* Takes what a reward model says of each item as the prior of its true preference. Items longer
 * than the model's positions keep theirs. */
static void rater_inform(rater_set *s, rlhf_model *m, rlhf_tokenizer *tok) {
    model_need_score(m);
    tok_buf b = {.ctx = s->ctx};
    for (int i = 0; i < s->n_items; i++) {
        const rater_item *item = s->item + i;
        char *line =
            mem_printf(s->ctx, "%.*s%s\"chosen\":%s,\"rejected\":%s,\"number\":%d}\n",
                       (int)strlen(item->prompt) - 1, item->prompt,
                       item->prompt[1] == '}' ? "" : ",", item->answer[0], item->answer[1], i);
        tok_put(&b, line, strlen(line));
        mem_free(line);
    }
    rlhf_data_config config = {.kind = RLHF_DATA_PREFERENCE,
                               .max_length = m->c.positions,
                               .max_records = -1,
                               .completion_only_loss = 1,
                               .add_eos = 1};
    rlhf_dataset *d = data_parse(s->ctx, b.p, b.n, "items", tok, &config);
    err_defer(s->ctx, data_drop_store, &d->store);
    arena_reset(&m->ws);
    float *score = rm_score_pairs(m, &m->ws, d);
    for (int i = 0; i < d->n; i++) {
        json_t *j = json_loads(d->record[i].line, 0, NULL);
        double p = (double)v_sigmoid1(score[2 * i] - score[2 * i + 1]);
        s->item[json_integer_value(json_object_get(j, "number"))].prior =
            fmin(fmax(p, RATER_SEEN), 1 - RATER_SEEN);
        json_decref(j);
    }
    err_release(s->ctx);
    mem_free(d);
    mem_free(b.p);
}

/* A record of labels: its soft label becomes the item's prior, its weight a vote's seconds. */
static void rater_read_label(rater_set *s, const json_src *src, json_t *j) {
    if (!json_is_object(j)) json_bad(src, "record", j, "an object");
    rater_pair p = rater_read_pair(src, j);
    double label = json_need_real(src, j, "soft_label"),
           weight = json_opt_real(src, j, "weight", 1);
    if (!(label >= 0 && label <= 1))
        json_bad(src, "soft_label", json_get(j, "soft_label"), "a number from 0 to 1");
    if (!(weight >= 0)) json_bad(src, "weight", json_get(j, "weight"), "a number not below 0");
    int item = rater_item_of(s, &p), turned = strcmp(p.answer[0], s->item[item].answer[0]) != 0;
    s->item[item].prior = turned ? 1 - label : label;
    stbds_arrput(s->vote, ((rater_vote){.item = item, .seconds = weight}));
}

/* Gives the pairs of a dataset the labels of their items: how is "none", "majority", "em", or a
 * file that rater_labels wrote. All records of an item weigh as much as one, times the mean number,
 * so that the mean weight is 1 where the file's are: what one pair was asked often does not make it
 * more of the likelihood. Pairs that the file does not know keep their label. */
static void rater_weigh(rlhf_dataset *d, const char *how) {
    rlhf_ctx *ctx = d->ctx;
    /* The dataset has chosen which judgements count. */
    rater_set s = {.ctx = ctx, .judged = {.aspect = "", .use_unqualified = 1}};
    int file = strcmp(how, "em") && strcmp(how, "majority"), unknown = 0;
    if (!strcmp(how, "none")) return;
    if (!*how)
        err_throw(ctx, RLHF_ERR_ARG,
                  "annotator_weights is \"\", expected none, majority, em or a file's path");
    if (file) rater_each_in(&s, how, rater_read_label);
    int known = (int)stbds_arrlen(s.item);
    double *weight = rater_zalloc(ctx, (size_t)known, sizeof *weight);
    for (ptrdiff_t i = 0; i < stbds_arrlen(s.vote); i++) weight[s.vote[i].item] = s.vote[i].seconds;
    /* Items of the records, in turn with them. */
    int *item = rater_zalloc(ctx, (size_t)d->n, sizeof *item);
    uint8_t *turned = rater_zalloc(ctx, (size_t)d->n, 1);
    double *own = rater_zalloc(ctx, (size_t)d->n, sizeof *own);
    char at[64];
    for (int i = 0; i < d->n; i++) {
        json_src src = json_source(ctx, at);
        snprintf(at, sizeof at, "training record %d", i + 1);
        src.status = RLHF_ERR_DATA;
        json_t *j = json_parse(&src, d->record[i].line, strlen(d->record[i].line));
        rater_pair p = rater_read_pair(&src, j);
        own[i] = json_opt_real(&src, j, "weight", 1);
        item[i] = rater_item_of(&s, &p);
        /* The record's first sequence is what was chosen. */
        turned[i] = strcmp(p.answer[p.value == RATER_B], s.item[item[i]].answer[0]) != 0;
        if (!file) rater_read_record(&s, &src, j);
        err_release(ctx);
    }
    int n = (int)stbds_arrlen(s.item), items = 0;
    double *p = NULL;
    if (!file) {
        rater_sort(&s);
        rater_fit f = rater_fit_new(&s);
        p = f.p;
        if (!strcmp(how, "em")) rater_estimate(&s, &f, -1);
        else rater_vote_shares(&s, p, -1);
        for (int i = 0; i < n && !strcmp(how, "majority"); i++)
            p[i] = p[i] > 0.5 ? 1 : p[i] < 0.5 ? 0 : 0.5;
    }
    int *records = rater_zalloc(ctx, (size_t)n, sizeof *records);
    for (int i = 0; i < d->n; i++) items += !records[item[i]]++;
    for (int i = 0; i < d->n; i++) {
        data_record *rec = d->record + i;
        int k = item[i];
        if (file && k >= known) {
            unknown++;
            continue;
        }
        double label = p ? p[k] : s.item[k].prior;
        rec->doubt = turned[i] ? label : 1 - label;
        rec->weight = own[i] * (file ? weight[k] : 1) * d->n / ((double)items * records[k]);
    }
    if (unknown)
        log_at(ctx, RLHF_LOG_WARNING, "%s: %d of %d pairs are not in it and keep their labels", how,
               unknown, d->n);
    rater_free(&s);
}

/* ============================================================================================
 * MARK: - 33 API (rlhf_ api_)
 * Every public function: checks arguments, opens the frame that errors unwind to, calls one layer
 * down. Nothing is computed here. rlhf.h documents them.
 *
 * Null pointers are refused before there is a frame, since the context is behind one of them; such
 * a call returns RLHF_ERR_ARG and leaves no text. Results are null until the call succeeds. All
 * other checks stand behind API_ENTER, where they can throw a text that names the parameter.
 * Functions that only read a number out of an object need no frame.
 * Tests: test/test_api.c
 * ============================================================================================ */

/* Opens the frame of a public call; an error below lands here and becomes its status. setjmp keeps
 * no local variable that changes later: nothing but api_ctx is read after a jump. */
#define API_ENTER(context)                                                                         \
    rlhf_ctx *api_ctx = (context);                                                                 \
    err_frame api_frame;                                                                           \
    mem_enter(api_ctx, &api_frame);                                                                \
    if (setjmp(api_frame.jump)) return mem_leave(api_ctx, 1)

/* The call's only other end. */
#define API_LEAVE() return mem_leave(api_ctx, 0)

/* Throws unless the condition holds; the text names the parameter. */
#define API_CHECK(condition, text)                                                                 \
    do {                                                                                           \
        if (!(condition)) err_throw(api_ctx, RLHF_ERR_ARG, "%s", text);                            \
    } while (0)

const char *rlhf_status_text(rlhf_status status) {
    static const char *const texts[] = {
#define API_STATUS_TEXT(name, text) text,
        RLHF_STATUS_LIST(API_STATUS_TEXT)
#undef API_STATUS_TEXT
    };
    size_t i = (size_t)status;
    return i < sizeof texts / sizeof *texts ? texts[i] : "unknown status";
}

/* ---- context ---- */

/* Bytes from which a block is a mapping of its own, which goes back to the system when it is freed:
 * malloc may keep it, and training's arrays are most of what a program has. */
#define API_LARGE ((size_t)1 << 18)

/* What is mapped for a large block: whole pages of any system. */
static size_t api_mapped(size_t size) { return base_round_up(size, (size_t)1 << 16); }

/* Hooks of a host that gives none. */
static void *api_default_alloc(void *user, size_t size) {
    (void)user;
    if (size < API_LARGE) return malloc(size);
    if (size > SIZE_MAX / 2) return NULL;
    /* Large pages, where the system leaves them to the program, begin at their multiples: fewer
     * page faults, and strided reads that need no walk of the page table. */
    const size_t page = (size_t)1 << 21;
    size_t whole = api_mapped(size), more = size >= 2 * page ? page : 0;
    char *p = mmap(NULL, whole + more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (!more) return p;
    size_t skip = (page - (uintptr_t)p % page) % page;
    if (skip) munmap(p, skip);
    p += skip;
    munmap(p + whole, page - skip);
#ifdef MADV_HUGEPAGE
    madvise(p, size / page * page, MADV_HUGEPAGE);
#endif
    return p;
}

static void api_default_free(void *user, void *ptr, size_t size) {
    (void)user;
    if (size < API_LARGE) free(ptr);
    else munmap(ptr, api_mapped(size));
}

rlhf_options rlhf_options_default(void) {
    return (rlhf_options){.threads = 0, .isa = "auto", .dtype = "f32"};
}

/* The best kernels that the processor has and the options allow. The context itself comes through
 * the hook, but is no block: blocks need one. */
rlhf_status rlhf_open(rlhf_ctx **ctx, const rlhf_options *options) {
    rlhf_options o = options ? *options : rlhf_options_default();
    const k_table *k = NULL;
    if (!ctx) return RLHF_ERR_ARG;
    *ctx = NULL;
    /* k_tables begins with the best. */
    for (int i = 0; i < K_TABLES && !k; i++)
        if (k_tables[i]->available() &&
            (!o.isa || !strcmp(o.isa, "auto") || !strcmp(o.isa, k_tables[i]->name)))
            k = k_tables[i];
    if (!base_is_choice("f32|bf16", o.dtype ? o.dtype : "f32")) return RLHF_ERR_ARG;
    if (!k || o.threads < 0 || o.threads > RLHF_MAX_THREADS || !o.hooks.alloc != !o.hooks.free)
        return RLHF_ERR_ARG;
    if (!o.hooks.alloc) {
        o.hooks.alloc = api_default_alloc;
        o.hooks.free = api_default_free;
    }
    rlhf_ctx *c = o.hooks.alloc(o.hooks.user, sizeof *c);
    if (!c) return RLHF_ERR_MEMORY;
    memset(c, 0, sizeof *c);
    c->hooks = o.hooks;
    c->threads = o.threads ? o.threads : base_min(par_default_threads(), RLHF_MAX_THREADS);
    c->k = k;
    c->half = o.dtype && !strcmp(o.dtype, "bf16");
    c->cache = par_cache_size();
    c->team = par_new(c);
    if (!c->team) {
        o.hooks.free(o.hooks.user, c, sizeof *c);
        return RLHF_ERR_MEMORY;
    }
    *ctx = c;
    if (c->half && !k->bf16.peak)
        log_at(c, RLHF_LOG_WARNING,
               "this processor (%s) has no products of bfloat16: results are rounded as such, but "
               "nothing is faster",
               k->name);
    return RLHF_OK;
}

/* Gives back what objects still hold, too, but for what jansson allocated: that goes with its
 * objects only. */
void rlhf_close(rlhf_ctx *ctx) {
    if (!ctx) return;
    /* Models that are still open go with their blocks; mappings are none of these. */
    for (model_base *b = ctx->bases; b; b = b->next)
        for (int i = 0; i < b->n_maps; i++) io_unmap(b->maps[i]);
    while (ctx->blocks) mem_free(ctx->blocks + 1);
    par_free(ctx);
    rlhf_hooks h = ctx->hooks;
    h.free(h.user, ctx, sizeof *ctx);
}

const char *rlhf_error(const rlhf_ctx *ctx) { return ctx ? ctx->error : ""; }

/* Static texts: there is no context to hold one. */
const char *rlhf_isas(void) {
#if RLHF_X86
    return gemm_has_amx()      ? "amx avx512bf16 avx512 avx2 ref"
           : gemm_has_bf16()   ? "avx512bf16 avx512 avx2 ref"
           : gemm_has_avx512() ? "avx512 avx2 ref"
           : gemm_has_avx2()   ? "avx2 ref"
                               : "ref";
#elif RLHF_NEON
    return "neon ref";
#else
    return "ref";
#endif
}

void rlhf_free(rlhf_ctx *ctx, void *ptr) {
    (void)ctx;
    mem_free(ptr);
}

rlhf_status rlhf_info(rlhf_ctx *ctx, char **json) {
    if (!ctx || !json) return RLHF_ERR_ARG;
    API_ENTER(ctx);
    json_t *j = json_hold(ctx, json_object());
    char cpu[128] = "unknown";
    /* Linux tells; elsewhere the name stays unknown. */
    FILE *f = fopen("/proc/cpuinfo", "r");
    for (char line[256]; f && fgets(line, sizeof line, f);)
        if (sscanf(line, "model name : %127[^\n]", cpu) == 1) break;
    if (f) fclose(f);
    json_object_set_new(j, "version", json_string(RLHF_VERSION));
    json_object_set_new(j, "cpu", json_string(cpu));
    json_object_set_new(j, "isa", json_string(ctx->k->name));
    json_object_set_new(j, "available", json_string(rlhf_isas()));
    json_object_set_new(j, "dtype", json_string(ctx->half ? "bf16" : "f32"));
    json_object_set_new(j, "threads", json_integer(ctx->threads));
    json_object_set_new(j, "processors", json_integer(par_default_threads()));
    *json = json_text(ctx, j, JSON_COMPACT, NULL);
    err_release(ctx);
    API_LEAVE();
}

/* ---- tokenizer ---- */

rlhf_status rlhf_tokenizer_open(rlhf_ctx *ctx, const char *path, rlhf_tokenizer **tokenizer) {
    if (!ctx || !path || !tokenizer) return RLHF_ERR_ARG;
    *tokenizer = NULL;
    API_ENTER(ctx);
    *tokenizer = tok_open(ctx, path);
    API_LEAVE();
}

void rlhf_tokenizer_close(rlhf_tokenizer *tokenizer) {
    if (tokenizer) tok_free(tokenizer);
}

rlhf_status rlhf_tokenizer_train(rlhf_ctx *ctx, const char *const *texts, const size_t *lens, int n,
                                 int vocab_size, rlhf_tokenizer **tokenizer) {
    if (!ctx || !texts || !lens || !tokenizer) return RLHF_ERR_ARG;
    *tokenizer = NULL;
    API_ENTER(ctx);
    *tokenizer = tok_train(ctx, texts, lens, n, vocab_size);
    API_LEAVE();
}

rlhf_status rlhf_tokenizer_save(rlhf_tokenizer *tokenizer, const char *dir) {
    if (!tokenizer || !dir) return RLHF_ERR_ARG;
    API_ENTER(tokenizer->ctx);
    io_mkdirs(api_ctx, dir);
    tok_save(tokenizer, dir);
    API_LEAVE();
}

int rlhf_tokenizer_vocab_size(const rlhf_tokenizer *tokenizer) {
    return tokenizer ? tokenizer->vocab_size : 0;
}

int rlhf_tokenizer_eos(const rlhf_tokenizer *tokenizer) { return tokenizer ? tokenizer->eos : -1; }

int rlhf_tokenizer_bos(const rlhf_tokenizer *tokenizer) { return tokenizer ? tokenizer->bos : -1; }

rlhf_status rlhf_encode(rlhf_tokenizer *tokenizer, const char *text, size_t len, int add_special,
                        int32_t *ids, int cap, int *n) {
    if (!tokenizer || (!text && len) || (!ids && cap > 0) || !n) return RLHF_ERR_ARG;
    *n = 0;
    API_ENTER(tokenizer->ctx);
    tok_ids out = {0};
    tok_encode(tokenizer, text ? text : "", len, add_special, &out);
    *n = out.n;
    if (out.n && cap > 0) memcpy(ids, out.ids, (size_t)base_min(cap, out.n) * sizeof *ids);
    mem_free(out.ids);
    API_LEAVE();
}

rlhf_status rlhf_decode(rlhf_tokenizer *tokenizer, const int32_t *ids, int n, int skip_special,
                        char **text, size_t *len) {
    if (!tokenizer || (!ids && n) || n < 0 || !text) return RLHF_ERR_ARG;
    *text = NULL;
    API_ENTER(tokenizer->ctx);
    *text = tok_decode(tokenizer, ids, n, skip_special, len);
    API_LEAVE();
}

/* ---- dataset ---- */

rlhf_data_config rlhf_data_config_default(rlhf_data_kind kind) {
    return (rlhf_data_config){.kind = kind,
                              .max_length = 1024,
                              .max_records = -1,
                              .completion_only_loss = 1,
                              .add_eos = 1,
                              .chat_template = "auto",
                              .aspect = ""};
}

const char *rlhf_chat_templates(void) { return "auto|" CHAT_NAMES; }

rlhf_status rlhf_dataset_open(rlhf_ctx *ctx, const char *path, rlhf_tokenizer *tokenizer,
                              const rlhf_data_config *config, rlhf_dataset **dataset) {
    if (!ctx || !path || !tokenizer || !config || !dataset) return RLHF_ERR_ARG;
    *dataset = NULL;
    API_ENTER(ctx);
    *dataset = data_open(ctx, path, tokenizer, config);
    API_LEAVE();
}

rlhf_status rlhf_dataset_parse(rlhf_ctx *ctx, const char *jsonl, size_t len, const char *name,
                               rlhf_tokenizer *tokenizer, const rlhf_data_config *config,
                               rlhf_dataset **dataset) {
    if (!ctx || !jsonl || !name || !tokenizer || !config || !dataset) return RLHF_ERR_ARG;
    *dataset = NULL;
    API_ENTER(ctx);
    *dataset = data_parse(ctx, jsonl, len, name, tokenizer, config);
    API_LEAVE();
}

void rlhf_dataset_close(rlhf_dataset *dataset) {
    if (dataset) data_free(dataset);
}

int rlhf_dataset_count(const rlhf_dataset *dataset) { return dataset ? dataset->n : 0; }

int rlhf_dataset_dropped(const rlhf_dataset *dataset) { return dataset ? dataset->dropped : 0; }

int64_t rlhf_dataset_tokens(const rlhf_dataset *dataset) { return dataset ? dataset->tokens : 0; }

const char *rlhf_dataset_record(const rlhf_dataset *dataset, int i) {
    return dataset && i >= 0 && i < dataset->n ? dataset->record[i].line : NULL;
}

/* ---- model ---- */

rlhf_status rlhf_model_open(rlhf_ctx *ctx, const char *dir, rlhf_model **model) {
    if (!ctx || !dir || !model) return RLHF_ERR_ARG;
    *model = NULL;
    API_ENTER(ctx);
    *model = ckpt_open(ctx, dir);
    API_LEAVE();
}

rlhf_status rlhf_model_init(rlhf_ctx *ctx, const char *config_json, int vocab_size, int bos,
                            int eos, uint64_t seed, rlhf_model **model) {
    if (!ctx || !config_json || !model) return RLHF_ERR_ARG;
    *model = NULL;
    API_ENTER(ctx);
    /* What the caller names replaces what the file says, also when the model is saved. */
    json_src src = json_source(ctx, config_json);
    json_t *config = json_read(&src);
    if (vocab_size > 0) json_object_set_new(config, "vocab_size", json_integer(vocab_size));
    if (bos >= 0) json_object_set_new(config, "bos_token_id", json_integer(bos));
    if (eos >= 0) json_object_set_new(config, "eos_token_id", json_integer(eos));
    rlhf_model *m = ckpt_adopt(ctx, &src, config, NULL);
    err_keep(ctx);
    err_release(ctx);
    model_randomize(m, seed);
    *model = m;
    API_LEAVE();
}

rlhf_status rlhf_model_clone(rlhf_model *model, rlhf_head head, rlhf_model **copy) {
    if (!model || !copy) return RLHF_ERR_ARG;
    *copy = NULL;
    API_ENTER(model->ctx);
    *copy = ckpt_clone(model, head);
    API_LEAVE();
}

rlhf_status rlhf_model_save(rlhf_model *model, rlhf_tokenizer *tokenizer, const char *dir) {
    if (!model || !dir) return RLHF_ERR_ARG;
    API_ENTER(model->ctx);
    ckpt_save(model, dir, '4');
    if (tokenizer) tok_save(tokenizer, dir);
    API_LEAVE();
}

rlhf_status rlhf_model_merge(rlhf_model *model) {
    if (!model) return RLHF_ERR_ARG;
    API_ENTER(model->ctx);
    model_thaw(model);
    API_LEAVE();
}

rlhf_status rlhf_model_save_gguf(rlhf_model *model, rlhf_tokenizer *tokenizer, const char *path,
                                 const char *type) {
    if (!model || !path || !type) return RLHF_ERR_ARG;
    API_ENTER(model->ctx);
    gguf_save(model, tokenizer, path, type);
    API_LEAVE();
}

void rlhf_model_close(rlhf_model *model) {
    if (model) model_free(model);
}

rlhf_model_shape rlhf_model_get_shape(const rlhf_model *m) {
    if (!m) return (rlhf_model_shape){.model_type = ""};
    return (rlhf_model_shape){.model_type = m->family->type,
                              .head = m->c.head,
                              .vocab_size = m->c.vocab,
                              .hidden_size = m->c.d,
                              .num_layers = m->c.layers,
                              .num_heads = m->c.heads,
                              .num_kv_heads = m->c.kv_heads,
                              .head_dim = m->c.hd,
                              .intermediate_size = m->c.ff,
                              .max_positions = m->c.positions,
                              .tied = m->c.tied,
                              .n_params = model_count(m, 0),
                              .lora_r = m->c.lora.r,
                              .n_adapter = m->c.lora.r ? model_count(m, 1) : 0};
}

rlhf_status rlhf_model_hash(rlhf_model *model, char hash[17]) {
    if (!model || !hash) return RLHF_ERR_ARG;
    snprintf(hash, 17, "%016llx", (unsigned long long)model_hash(model));
    return RLHF_OK;
}

/* Runs one sequence; the states of its first n - drop tokens, normed. */
static model_top api_states(rlhf_model *m, const int32_t *ids, int n, int drop) {
    arena_reset(&m->ws);
    model_run run = model_batch(&m->ws, 1, &ids, &n);
    int *row = arena_alloc(&m->ws, (size_t)n * sizeof *row);
    for (int i = 0; i < n; i++) row[i] = i;
    model_forward(m, &m->ws, &run);
    return model_top_fwd(m, &m->ws, run.x, row, n - drop);
}

rlhf_status rlhf_model_logits(rlhf_model *model, const int32_t *ids, int n, float *logits) {
    if (!model || !ids || n < 1 || !logits) return RLHF_ERR_ARG;
    API_ENTER(model->ctx);
    model_need_lm(model);
    model_top top = api_states(model, ids, n, 0);
    op_weight w = model_head_weight(model, n);
    op_env e = {api_ctx, &model->ws};
    op_logits(&e, &w, n, top.h, logits);
    API_LEAVE();
}

rlhf_status rlhf_model_logprobs(rlhf_model *model, const int32_t *ids, int n, float *logprobs) {
    if (!model || !ids || n < 2 || !logprobs) return RLHF_ERR_ARG;
    API_ENTER(model->ctx);
    model_need_lm(model);
    model_top top = api_states(model, ids, n, 1);
    op_weight w = model_head_weight(model, n);
    op_env e = {api_ctx, &model->ws};
    op_rows out = {.logp = logprobs};
    op_vocab_run(&e, &w, n - 1, top.h, ids + 1, 1.0f, &out, NULL, NULL, NULL);
    API_LEAVE();
}

rlhf_status rlhf_model_score(rlhf_model *model, const int32_t *ids, int n, float *score) {
    if (!model || !ids || n < 1 || !score) return RLHF_ERR_ARG;
    API_ENTER(model->ctx);
    model_need_score(model);
    arena_reset(&model->ws);
    float raw;
    model_score_list(model, &model->ws, 1, &ids, &n, &raw);
    *score = model_reward(model, raw);
    API_LEAVE();
}

/* ---- configurations ---- */

rlhf_sft_config rlhf_sft_config_default(void) {
    rlhf_sft_config c;
    train_defaults(RLHF_CONFIG_SFT, &c);
    return c;
}

rlhf_rm_config rlhf_rm_config_default(void) {
    rlhf_rm_config c;
    train_defaults(RLHF_CONFIG_RM, &c);
    return c;
}

rlhf_ppo_config rlhf_ppo_config_default(void) {
    rlhf_ppo_config c;
    train_defaults(RLHF_CONFIG_PPO, &c);
    return c;
}

rlhf_generate_config rlhf_generate_config_default(void) {
    rlhf_generate_config c;
    train_defaults(RLHF_CONFIG_GENERATE, &c);
    return c;
}

rlhf_eval_config rlhf_eval_config_default(void) {
    rlhf_eval_config c;
    train_defaults(RLHF_CONFIG_EVAL, &c);
    return c;
}

rlhf_raters_config rlhf_raters_config_default(void) {
    rlhf_raters_config c;
    train_defaults(RLHF_CONFIG_RATERS, &c);
    return c;
}

const rlhf_field *rlhf_config_fields(rlhf_config_kind kind, int *n) {
    if ((unsigned)kind >= sizeof train_tables / sizeof *train_tables) return *n = 0, NULL;
    *n = train_tables[kind].n;
    return train_tables[kind].row;
}

/* ---- generation ---- */

/* Samples for n prompts whose ids are given; everything a sample points at is one block behind the
 * array's own. */
static rlhf_sample *api_generate(rlhf_model *m, rlhf_tokenizer *tok, const rlhf_generate_config *c,
                                 const data_seq *prompt, const char *const *text,
                                 const char *const *record, int n, int *count) {
    rlhf_ctx *ctx = m->ctx;
    model_need_lm(m);
    train_validate(ctx, RLHF_CONFIG_GENERATE, c);
    if ((int64_t)n * c->num_return_sequences > INT_MAX / 2)
        err_throw(ctx, RLHF_ERR_ARG,
                  "%d prompts, num_return_sequences %lld: too many samples for one call", n,
                  (long long)c->num_return_sequences);
    arena_reset(&m->ws);
    int each = (int)c->num_return_sequences, total = n * each, room = (int)c->max_new_tokens;
    /* One item for each continuation; its number is the sample's key. */
    gen_item *item = arena_alloc(&m->ws, (size_t)total * sizeof *item);
    for (int i = 0; i < total; i++)
        item[i] = (gen_item){.prompt = prompt[i / each].ids,
                             .n_prompt = prompt[i / each].n,
                             .key = (uint64_t)i,
                             .turn_end = prompt[i / each].turn_end,
                             .out = arena_alloc(&m->ws, (size_t)room * sizeof(int32_t)),
                             .logp = arena_floats(&m->ws, (size_t)room, 1)};
    gen_config g = {.max_new = room,
                    .top_k = (int)c->top_k,
                    .batch = (int)c->batch_size,
                    .temperature = (float)c->temperature,
                    .top_p = c->top_p,
                    .seed = (uint64_t)c->seed,
                    .stop = -1};
    if (!gen_run(m, &m->ws, &g, item, total, "generate"))
        err_throw(ctx, RLHF_STOPPED, "stopped by the progress hook");
    /* Results outlive the arena: copies, as blocks that rlhf_samples_free knows. */
    rlhf_sample *s = mem_zalloc(ctx, (size_t)total + 1, sizeof *s);
    for (int i = 0; i < total; i++) {
        const gen_item *it = item + i;
        int32_t *ids = mem_alloc(ctx, (size_t)(it->n_prompt + it->n) * sizeof *ids);
        memcpy(ids, it->prompt, (size_t)it->n_prompt * sizeof *ids);
        memcpy(ids + it->n_prompt, it->out, (size_t)it->n * sizeof *ids);
        s[i] = (rlhf_sample){.prompt = mem_strdup(ctx, text[i / each]),
                             .prompt_ids = ids,
                             .n_prompt = it->n_prompt,
                             .completion_ids = ids + it->n_prompt,
                             .n_completion = it->n,
                             .finished = it->finished,
                             .prompt_index = i / each,
                             .sample_index = i % each};
        s[i].completion = gen_text(tok, it->out, it->n);
        if (record) s[i].record = mem_strdup(ctx, record[i / each]);
        for (int k = 0; k < it->n; k++) s[i].logprob += (double)it->logp[k];
    }
    *count = total;
    return s;
}

rlhf_status rlhf_generate(rlhf_model *model, rlhf_tokenizer *tokenizer,
                          const rlhf_generate_config *config, const char *const *prompts, int n,
                          rlhf_sample **samples, int *count) {
    if (!model || !tokenizer || !config || !prompts || n < 1 || !samples || !count)
        return RLHF_ERR_ARG;
    *samples = NULL;
    *count = 0;
    API_ENTER(model->ctx);
    /* Temporary blocks: an error or the end of the call gives them back. */
    data_seq *seq = mem_temp(mem_zalloc(api_ctx, (size_t)n, sizeof *seq));
    for (int i = 0; i < n; i++) {
        API_CHECK(prompts[i], "a prompt is null");
        tok_ids ids = {0};
        tok_encode(tokenizer, prompts[i], strlen(prompts[i]), 1, &ids);
        if (!ids.n && tokenizer->bos >= 0) tok_push(api_ctx, &ids, tokenizer->bos);
        seq[i] = (data_seq){.n = ids.n, .ids = ids.n ? mem_temp(ids.ids) : NULL};
    }
    *samples = api_generate(model, tokenizer, config, seq, prompts, NULL, n, count);
    API_LEAVE();
}

rlhf_status rlhf_generate_dataset(rlhf_model *model, rlhf_tokenizer *tokenizer,
                                  const rlhf_generate_config *config, rlhf_dataset *prompts,
                                  rlhf_sample **samples, int *count) {
    if (!model || !tokenizer || !config || !prompts || !samples || !count) return RLHF_ERR_ARG;
    *samples = NULL;
    *count = 0;
    API_ENTER(model->ctx);
    API_CHECK(prompts->config.kind == RLHF_DATA_PROMPT,
              "generation needs a dataset of kind RLHF_DATA_PROMPT");
    /* text[0, n) are the prompts' texts, text[n, 2 n) their records. */
    size_t n = (size_t)prompts->n;
    data_seq *seq = mem_temp(mem_alloc(api_ctx, n * sizeof *seq));
    const char **text = mem_temp(mem_alloc(api_ctx, 2 * n * sizeof *text));
    for (size_t i = 0; i < n; i++) {
        seq[i] = prompts->record[i].a;
        text[i] = prompts->record[i].prompt;
        text[n + i] = prompts->record[i].line;
    }
    *samples = api_generate(model, tokenizer, config, seq, text, text + n, prompts->n, count);
    API_LEAVE();
}

void rlhf_samples_free(rlhf_ctx *ctx, rlhf_sample *samples, int count) {
    (void)ctx;
    for (int i = 0; samples && i < count; i++) {
        mem_free((char *)(uintptr_t)samples[i].prompt);
        mem_free((char *)(uintptr_t)samples[i].completion);
        mem_free((char *)(uintptr_t)samples[i].record);
        mem_free((int32_t *)(uintptr_t)samples[i].prompt_ids);
    }
    mem_free(samples);
}

/* ---- evaluation ---- */

rlhf_status rlhf_score_dataset(rlhf_model *reward, rlhf_dataset *dataset, float *scores) {
    if (!reward || !dataset || !scores) return RLHF_ERR_ARG;
    API_ENTER(reward->ctx);
    model_need_score(reward);
    API_CHECK(dataset->config.kind == RLHF_DATA_SCORE || dataset->config.kind == RLHF_DATA_SFT,
              "scoring needs a dataset of kind RLHF_DATA_SCORE");
    arena_reset(&reward->ws);
    eval_score(reward, &reward->ws, dataset, scores);
    API_LEAVE();
}

rlhf_status rlhf_eval_pairs(rlhf_model *reward, rlhf_dataset *dataset,
                            const rlhf_eval_config *config, char **json) {
    if (!reward || !dataset || !config || !json) return RLHF_ERR_ARG;
    *json = NULL;
    API_ENTER(reward->ctx);
    train_validate(api_ctx, RLHF_CONFIG_EVAL, config);
    API_CHECK(dataset->config.kind == RLHF_DATA_PREFERENCE,
              "comparing pairs needs a dataset of kind RLHF_DATA_PREFERENCE");
    API_CHECK(!*config->aspect || !strcmp(config->aspect, dataset->config.aspect),
              "aspect: the dataset was opened for another one");
    API_CHECK(!config->per_turn || dataset->config.turns,
              "per_turn needs a dataset that was opened with turns = 1");
    arena_reset(&reward->ws);
    json_t *j = eval_preferences(reward, &reward->ws, dataset, config);
    *json = json_text(api_ctx, j, JSON_COMPACT, NULL);
    err_release(api_ctx);
    API_LEAVE();
}

rlhf_status rlhf_eval(rlhf_model *model, rlhf_dataset *dataset, rlhf_model *reference,
                      char **json) {
    if (!model || !dataset || !json) return RLHF_ERR_ARG;
    *json = NULL;
    API_ENTER(model->ctx);
    API_CHECK(dataset->config.kind != RLHF_DATA_PROMPT, "prompts alone cannot be evaluated");
    if (reference) model_need_lm(reference);
    arena_reset(&model->ws);
    int pairs = dataset->config.kind == RLHF_DATA_PREFERENCE;
    rlhf_eval_config by = rlhf_eval_config_default();
    json_t *j = pairs ? eval_preferences(model, &model->ws, dataset, &by)
                      : eval_text(model, reference, &model->ws, dataset);
    *json = json_text(api_ctx, j, JSON_COMPACT, NULL);
    err_release(api_ctx);
    API_LEAVE();
}

rlhf_status rlhf_raters(rlhf_ctx *ctx, const char *const *paths, int n,
                        const rlhf_raters_config *config, rlhf_model *reward,
                        rlhf_tokenizer *tokenizer, char **report, char **labels) {
    if (!ctx || !paths || n < 1 || !config || !report) return RLHF_ERR_ARG;
    *report = NULL;
    if (labels) *labels = NULL;
    API_ENTER(ctx);
    train_validate(ctx, RLHF_CONFIG_RATERS, config);
    API_CHECK(!reward || tokenizer, "a reward model needs a tokenizer");
    for (int i = 0; i < n; i++) API_CHECK(paths[i], "a path is null");
    rater_set set = {.ctx = ctx,
                     .seed = (uint64_t)config->seed,
                     .replicates = (int)config->bootstrap,
                     .judged = {config->aspect, config->use_unqualified, NULL}};
    rater_read(&set, paths, n);
    if (reward) rater_inform(&set, reward, tokenizer);
    rater_fit fit = rater_fit_new(&set);
    rater_estimate(&set, &fit, -1);
    char *text = labels ? rater_labels(&set, &fit) : NULL;
    *report = json_text(ctx, rater_report(&set, &fit, config), JSON_COMPACT, NULL);
    if (labels) *labels = text;
    err_release(ctx);
    rater_free(&set);
    API_LEAVE();
}

/* ---- training ---- */

rlhf_status rlhf_sft_open(rlhf_model *model, rlhf_tokenizer *tokenizer, rlhf_dataset *train,
                          rlhf_dataset *eval, const rlhf_sft_config *config,
                          rlhf_trainer **trainer) {
    if (!model || !train || !config || !trainer) return RLHF_ERR_ARG;
    *trainer = NULL;
    API_ENTER(model->ctx);
    API_CHECK(train->config.kind == RLHF_DATA_SFT,
              "fine-tuning needs a dataset of kind RLHF_DATA_SFT");
    *trainer = sft_open(model, tokenizer, train, eval, config);
    API_LEAVE();
}

rlhf_status rlhf_rm_open(rlhf_model *model, rlhf_model *start, rlhf_tokenizer *tokenizer,
                         rlhf_dataset *train, rlhf_dataset *eval, const rlhf_rm_config *config,
                         rlhf_trainer **trainer) {
    if (!model || !train || !config || !trainer) return RLHF_ERR_ARG;
    *trainer = NULL;
    API_ENTER(model->ctx);
    API_CHECK(train->config.kind == RLHF_DATA_PREFERENCE,
              "a reward model needs a dataset of kind RLHF_DATA_PREFERENCE");
    API_CHECK(!config->aspect || !*config->aspect || !strcmp(config->aspect, train->config.aspect),
              "aspect: the dataset was opened for another one");
    if (config->annotator_weights) rater_weigh(train, config->annotator_weights);
    *trainer = rm_open(model, start, tokenizer, train, eval, config);
    API_LEAVE();
}

rlhf_status rlhf_rm_temperatures(rlhf_trainer *trainer, char **json) {
    if (!trainer || !json) return RLHF_ERR_ARG;
    *json = NULL;
    API_ENTER(trainer->ctx);
    *json = json_text(api_ctx, rm_temperatures(trainer), JSON_COMPACT, NULL);
    err_release(api_ctx);
    API_LEAVE();
}

rlhf_status rlhf_ppo_open(rlhf_model *policy, rlhf_tokenizer *tokenizer, rlhf_dataset *prompts,
                          rlhf_model *reward, rlhf_reward_fn function, void *user,
                          const rlhf_ppo_config *config, rlhf_trainer **trainer) {
    if (!policy || !prompts || !config || !trainer) return RLHF_ERR_ARG;
    *trainer = NULL;
    API_ENTER(policy->ctx);
    *trainer = ppo_open(policy, tokenizer, prompts, reward, function, user, config);
    API_LEAVE();
}

rlhf_status rlhf_trainer_step(rlhf_trainer *trainer) {
    if (!trainer) return RLHF_ERR_ARG;
    API_ENTER(trainer->ctx);
    train_step(trainer);
    API_LEAVE();
}

rlhf_status rlhf_trainer_run(rlhf_trainer *trainer) {
    if (!trainer) return RLHF_ERR_ARG;
    API_ENTER(trainer->ctx);
    /* Not an error: the state is saved, nothing is to be given back. */
    if (!train_run(trainer)) {
        mem_leave(api_ctx, 0);
        err_note(api_ctx, RLHF_STOPPED, "stopped by the progress hook");
        return RLHF_STOPPED;
    }
    API_LEAVE();
}

int64_t rlhf_trainer_steps_done(const rlhf_trainer *trainer) { return trainer ? trainer->step : 0; }

int64_t rlhf_trainer_steps_total(const rlhf_trainer *trainer) {
    return trainer ? trainer->total : 0;
}

double rlhf_trainer_metric(const rlhf_trainer *trainer, const char *name) {
    for (int i = 0; trainer && name && i < trainer->metrics; i++)
        if (!strcmp(trainer->metric[i].name, name)) return trainer->metric[i].value;
    return NAN;
}

rlhf_memory rlhf_trainer_memory(const rlhf_trainer *trainer) {
    return trainer ? trainer->memory : (rlhf_memory){0};
}

rlhf_status rlhf_trainer_metrics(rlhf_trainer *trainer, char **json) {
    if (!trainer || !json) return RLHF_ERR_ARG;
    *json = NULL;
    API_ENTER(trainer->ctx);
    *json = json_text(api_ctx, train_metrics_json(trainer, 0), JSON_COMPACT, NULL);
    err_release(api_ctx);
    API_LEAVE();
}

void rlhf_trainer_close(rlhf_trainer *trainer) {
    if (trainer) train_free(trainer);
}

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 34 BENCH (bench_)
 * How fast this machine does the work of RLHF, against its own limits: multiply-adds in registers
 * and the memory's bandwidth, measured first and beside each item. Random weights of named shapes,
 * nothing is downloaded. Equal weight hashes at the end mean that two machines did the same work.
 *
 * A share is the part of the roof that a result reaches, the roof being the smaller of what the
 * arithmetic and what the memory allow for that work (Williams, Waterman and Patterson 2009). Times
 * are medians, since other programs disturb a mean.
 * ============================================================================================ */

#ifndef RLHF_COMMIT
#define RLHF_COMMIT "no commit"
#endif

/* A model by name: a config.json without tokenizer. */
typedef struct bench_shape {
    const char *name, *config;
    int big;
} bench_shape;

#define BENCH_LLAMA(d, layers, heads, kv, ff, vocab)                                               \
    "{\"model_type\":\"llama\",\"hidden_size\":" #d ",\"num_hidden_layers\":" #layers              \
    ",\"num_attention_heads\":" #heads ",\"num_key_value_heads\":" #kv                             \
    ",\"intermediate_size\":" #ff ",\"vocab_size\":" #vocab                                        \
    ",\"max_position_embeddings\":4096,\"tie_word_embeddings\":true}"
#define BENCH_GPT2(d, layers, heads, vocab)                                                        \
    "{\"model_type\":\"gpt2\",\"n_embd\":" #d ",\"n_layer\":" #layers ",\"n_head\":" #heads        \
    ",\"n_positions\":1024,\"vocab_size\":" #vocab "}"

#define BENCH_QWEN2                                                                                \
    "{\"model_type\":\"qwen2\",\"hidden_size\":896,\"num_hidden_layers\":24,"                      \
    "\"num_attention_heads\":14,\"num_key_value_heads\":2,\"intermediate_size\":4864,"             \
    "\"vocab_size\":151936,\"max_position_embeddings\":4096,\"tie_word_embeddings\":true}"

/* big: fewer tokens a step. `all` measures the first four, smallest first. */
static const bench_shape bench_shapes[] = {
    {"llama-8m", BENCH_LLAMA(288, 6, 6, 6, 768, 8192), 0},
    {"gpt2-14m", BENCH_GPT2(384, 6, 6, 8192), 0},
    {"llama-15m", BENCH_LLAMA(288, 6, 6, 6, 768, 32000), 0},
    {"gpt2", BENCH_GPT2(768, 12, 12, 50257), 1},
    {"smollm2-135m", BENCH_LLAMA(576, 30, 9, 3, 1536, 49152), 1},
    {"qwen2.5-0.5b", BENCH_QWEN2, 1},
    {"llama3.2-1b", BENCH_LLAMA(2048, 16, 32, 8, 8192, 128256), 1}};
enum { BENCH_SHAPES = sizeof bench_shapes / sizeof *bench_shapes, BENCH_ALL = 4, BENCH_LIST = 256 };
#define BENCH_SHAPE_NAMES "llama-8m|gpt2-14m|llama-15m|gpt2|smollm2-135m|qwen2.5-0.5b|llama3.2-1b"

/* One line: value in unit, share of the roof (0: none), peak memory in MB. */
typedef struct bench_result {
    char name[64];
    const char *unit;
    double value, share, rss;
} bench_result;

/* The state of one `rlhf bench`. */
typedef struct bench {
    rlhf_ctx *ctx;
    int quick, json;
    double fma, bf16, dram; /* GFLOP/s, GFLOP/s (0: no such instructions), GB/s */
    const k_tiles *tiles;   /* of the products that models do here */
    double peak;            /* GFLOP/s of their multiply-adds while the last time was measured */
    const char *dtype;
    bench_result list[BENCH_LIST];
    int n;
    uint64_t hash; /* of the last model trained */
} bench;

/* ---- measuring ---- */

/* Peak resident memory since bench_forget, in MB; 0 where the system does not tell. */
static double bench_rss(void) {
    double kb = 0;
    FILE *f = fopen("/proc/self/status", "r");
    for (char line[256]; f && fgets(line, sizeof line, f);)
        if (sscanf(line, "VmHWM: %lf", &kb) == 1) break;
    if (f) fclose(f);
    return kb / 1024;
}

/* Lets the next peak begin at the memory held now, where the system can (Linux). */
static void bench_forget(void) {
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (f) {
        fputs("5", f);
        fclose(f);
    }
}

/* For qsort. */
static int bench_less(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double bench_median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, bench_less);
    return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

/* What multiply-adds in registers take. */
typedef struct bench_peak {
    const k_tiles *tiles;
    float sink;
    _Atomic double flops; /* of one piece */
} bench_peak;

enum { BENCH_PEAK_ROUNDS = 1 << 17, BENCH_PEAK_PIECES = 4 };

static void bench_peak_range(void *arg, int64_t lo, int64_t hi, int thread) {
    bench_peak *p = arg;
    float sink = 0;
    (void)thread;
    for (int64_t i = lo; i < hi; i++) p->flops = p->tiles->peak(BENCH_PEAK_ROUNDS, &sink);
    if (sink == 1) p->sink = sink; /* keeps the compiler from dropping the sums */
}

/* GFLOP/s in registers over at least so many seconds, 0 where the table has no such instructions.
 * All threads at once, a few pieces each: the limit is the machine's, not one core's. */
static double bench_fma(bench *b, const k_tiles *tiles, double least) {
    bench_peak p = {.tiles = tiles};
    int pieces = BENCH_PEAK_PIECES * b->ctx->threads;
    double at = base_now(), s = 0, flops = 0;
    while (tiles->peak && (flops == 0 || s < least)) {
        par_for(b->ctx, pieces, 1, bench_peak_range, &p);
        flops += pieces * p.flops;
        s = base_now() - at;
    }
    return flops > 0 ? flops / s / 1e9 : 0;
}

/* Median seconds of a call, after one that does not count: at least three (quick: two; of long ones
 * one, quick: the first itself), about a second (0.3) of them. Before and after, and behind every
 * long call, the multiply-adds are measured, for b->peak: what a machine gives changes by the
 * minute, with its clock and with what else it does. Short calls follow each other at once, with
 * warm caches. */
static double bench_time(bench *b, void (*run)(void *), void *arg) {
    double t[64], peak[66], begun = base_now();
    int n = 0, peaks = 0, least = b->quick ? 2 : 3;
    run(arg); /* touches memory, packs weights, wakes the threads */
    t[0] = base_now() - begun;
    if (t[0] > (b->quick ? 3 : 30)) least = 1, n = b->quick;
    peak[peaks++] = bench_fma(b, b->tiles, 0.005);
    while (n < 64 && (n < least || base_now() - begun < (b->quick ? 0.3 : 1.0))) {
        double at = base_now();
        run(arg);
        t[n] = base_now() - at;
        if (t[n] > 0.05) peak[peaks++] = bench_fma(b, b->tiles, t[n] / 64);
        n++;
    }
    peak[peaks++] = bench_fma(b, b->tiles, 0.005);
    b->peak = bench_median(peak, peaks);
    return bench_median(t, n);
}

/* Keeps a result and prints it, unless the output is JSON. */
static void bench_add(bench *b, const char *name, double value, const char *unit, double share) {
    if (b->n == BENCH_LIST) return;
    bench_result *r = b->list + b->n++;
    snprintf(r->name, sizeof r->name, "%s", name);
    r->value = value;
    r->unit = unit;
    r->share = isfinite(share) ? share : 0; /* a peak may be unknown */
    r->rss = bench_rss();
    if (b->json) return;
    printf("%-34s %10.1f %-8s", r->name, value, unit);
    if (r->share > 0) printf(" %5.1f %%", 100 * r->share);
    printf("\n");
    fflush(stdout);
}

/* ---- limits ---- */

/* Memory to be read. */
typedef struct bench_mem {
    const float *mem;
    int64_t pieces;
    float sink;
} bench_mem;

enum { BENCH_PIECE = 4096 };

/* Eight registers of the compiler's own vectors, so that nothing but the loads takes time: a sum of
 * floats would wait for its additions. */
typedef uint64_t bench_word __attribute__((vector_size(16), aligned(4), may_alias));

/* Reads memory in order. */
static void bench_read_range(void *arg, int64_t lo, int64_t hi, int thread) {
    bench_mem *p = arg;
    const bench_word *x = (const bench_word *)(p->mem + lo * BENCH_PIECE);
    bench_word bits[8] = {{0}};
    (void)thread;
    for (int64_t n = (hi - lo) * BENCH_PIECE / 32; n > 0; n--, x += 8) {
        V_UNROLL
        for (int j = 0; j < 8; j++) bits[j] ^= x[j];
    }
    for (int j = 1; j < 8; j++) bits[0] ^= bits[j];
    if (bits[0][0] == 1) p->sink = 1; /* keeps the compiler from dropping the loads */
}

static void bench_read_run(void *arg) {
    bench_mem *p = arg;
    par_for(base_current, p->pieces, 1, bench_read_range, p);
}

/* GB/s that reading so many bytes over and over reaches: from memory, or from the cache that holds
 * them. */
static double bench_read(bench *b, double bytes) {
    int64_t pieces = (int64_t)fmin(bytes, 1e9) / 4 / BENCH_PIECE + 1;
    float *mem = mem_zalloc(b->ctx, (size_t)pieces * BENCH_PIECE, sizeof *mem);
    bench_mem p = {.mem = mem, .pieces = pieces};
    double t = bench_time(b, bench_read_run, &p);
    mem_free(mem);
    return 4.0 * (double)pieces * BENCH_PIECE / t / 1e9;
}

/* What the arithmetic can do, and what memory delivers. */
static void bench_limits(bench *b) {
    const k_table *k = b->ctx->k;
    b->dtype = b->ctx->half ? "bf16" : "f32";
    double least = b->quick ? 0.2 : 0.5;
    b->fma = bench_fma(b, &k->f32, least);
    b->bf16 = bench_fma(b, &k->bf16, least);
    b->tiles = b->ctx->half && b->bf16 > 0 ? &k->bf16 : &k->f32;
    b->dram = bench_read(b, 256e6); /* more than most caches */
    bench_add(b, "limit/fma", b->fma, "GFLOP/s", b->fma > 0);
    if (b->bf16 > 0) bench_add(b, "limit/bf16", b->bf16, "GFLOP/s", 1);
    bench_add(b, "limit/dram", b->dram, "GB/s", 1);
}

/* ---- products ---- */

/* One of the three products of a linear layer. */
typedef struct bench_gemm_arg {
    op_env e;
    op_weight w;
    int m, what; /* 0 forward, 1 dX, 2 dW */
    float *x, *y;
} bench_gemm_arg;

static void bench_gemm_run(void *arg) {
    bench_gemm_arg *g = arg;
    if (g->what == 0) op_linear(&g->e, &g->w, g->m, g->x, g->y, NULL, NULL, NULL);
    if (g->what == 1) op_linear_bwd_x(&g->e, &g->w, g->m, g->y, g->x);
    if (g->what == 2) op_linear_bwd_w(&g->e, &g->w, g->m, g->x, g->y);
}

/* Shapes of transformer layers by rows: from decoding (1) to training (2048). Forward products of
 * few rows are bound by reading W, 2 m multiply-adds for each float. */
static void bench_gemm(bench *b) {
    static const int shapes[][2] = {{768, 768},   {768, 3072}, {3072, 768}, {768, 2304},
                                    {768, 50257}, {128, 128},  {128, 512},  {256, 1024},
                                    {288, 768},   {288, 32000}};
    static const char *const names[] = {"forward", "dX", "dW"};
    static const int rows[] = {1, 2, 4, 8, 16, 32, 256, 1024, 2048};
    int half = b->ctx->half;
    double bytes = half ? 2 : 4;
    for (int what = 0; what < 3; what++)
        for (size_t s = 0; s < (b->quick ? 3 : sizeof shapes / sizeof *shapes); s++) {
            int k = shapes[s][0], n = shapes[s][1];
            double read = what ? 0 : bench_read(b, bytes * k * n); /* GB/s, where W lies */
            for (size_t r = what ? 6 : 0; r < sizeof rows / sizeof *rows; r++) {
                int m = rows[r];
                if (b->quick && m != 1 && m != 32 && m != 256) continue;
                if ((n > 30000 && m > 256) || (n < 768 && m < 32)) continue;
                arena ws = {.ctx = b->ctx};
                err_defer(b->ctx, data_drop_store, &ws);
                bench_gemm_arg g = {.e = {b->ctx, &ws}, .m = m, .what = what};
                float *w = arena_zeros(&ws, (size_t)n, (size_t)k);
                float *packed = arena_floats(&ws, gemm_packed_size(b->ctx->k, half, k, n), 1);
                g.w = (op_weight){.n = n, .k = k, .w = w, .packed = packed, .half = half};
                if (what == 2) g.w.gw = w;
                gemm_pack(b->ctx, half, w, 1, (size_t)k, k, n, packed);
                g.x = arena_zeros(&ws, (size_t)m, (size_t)k);
                g.y = arena_zeros(&ws, (size_t)m, (size_t)n);
                /* Scratch in one block, as trainers have it after their first step. */
                bench_gemm_run(&g);
                arena_reserve(&ws, ws.peak - ws.total, 0);
                /* Few rows are bound by reading W once; many by the arithmetic. */
                double flops = 2.0 * m * n * k, t = bench_time(b, bench_gemm_run, &g);
                double roof = fmin(b->peak, what ? b->peak : 2.0 * m * read / bytes);
                char name[64];
                snprintf(name, sizeof name, "gemm/%s/%dx%dx%d/%s", names[what], m, k, n, b->dtype);
                bench_add(b, name, flops / t / 1e9, "GFLOP/s", flops / t / 1e9 / roof);
                err_release(b->ctx);
            }
        }
}

/* ---- models ---- */

/* The shape of that name, or null for a directory; throws for neither. */
static const bench_shape *bench_find(bench *b, const char *name) {
    for (int i = 0; i < BENCH_SHAPES; i++)
        if (!strcmp(bench_shapes[i].name, name)) return bench_shapes + i;
    if (!io_exists(ckpt_path(b->ctx, name, "config.json")))
        err_throw(b->ctx, RLHF_ERR_ARG,
                  "--model: \"%s\" is neither a directory with config.json nor one of "
                  BENCH_SHAPE_NAMES, name);
    return NULL;
}

/* A model of a named shape with random weights, or the one in a directory. */
static rlhf_model *bench_model(bench *b, const char *name, int score) {
    const bench_shape *shape = bench_find(b, name);
    if (!shape) return ckpt_open(b->ctx, name);
    json_src src = json_source(b->ctx, name);
    json_t *config = json_parse(&src, shape->config, strlen(shape->config));
    if (score)
        json_object_set_new(config, "architectures", json_pack("[s]", "ForSequenceClassification"));
    rlhf_model *m = ckpt_adopt(b->ctx, &src, config, NULL);
    err_keep(b->ctx);
    err_release(b->ctx);
    model_randomize(m, 1);
    if (score) {
        model_init_score(m, 1);
        m->score_trained = 1;
    }
    return m;
}

/* n records of len random tokens that all bear loss. */
static rlhf_dataset *bench_data(bench *b, const rlhf_model *m, rlhf_data_kind kind, int n,
                                int len) {
    rlhf_dataset *d = mem_zalloc(b->ctx, 1, sizeof *d);
    d->ctx = d->store.ctx = b->ctx;
    d->config = rlhf_data_config_default(kind);
    d->record = arena_alloc(&d->store, (size_t)n * sizeof *d->record);
    memset(d->record, 0, (size_t)n * sizeof *d->record);
    /* Ids from a fixed seed: the same on every machine. */
    for (int i = 0; i < n; i++) {
        data_seq s = {.n = len,
                      .ids = arena_alloc(&d->store, (size_t)len * sizeof *s.ids),
                      .loss = arena_alloc(&d->store, (size_t)len)};
        memset(s.loss, 1, (size_t)len);
        for (int t = 0; t < len; t++)
            s.ids[t] = (int32_t)(rng_u64(7, (uint64_t)i, (uint64_t)t) % (uint64_t)m->c.vocab);
        d->record[i] = (data_record){.line = "{}", .prompt = "", .weight = 1, .a = s};
    }
    d->n = n;
    d->tokens = (int64_t)n * len;
    return d;
}

/* Multiply-adds of one token's forward pass through the matrices, and through attention at a mean
 * context: twice that many operations, three times that for training (forward, dX, dW). */
static double bench_macs(const rlhf_model *m, double context, int head) {
    double macs = 0;
    static const int mats[] = {P_QKV_W, P_O_W, P_UP_W, P_DOWN_W};
    for (int i = 0; i < 4; i++) macs += (double)m->slot[mats[i]].n * m->c.layers;
    if (head) macs += (double)m->c.vocab * m->c.d;
    return macs + 2.0 * context * m->c.heads * m->c.hd * m->c.layers;
}

/* The trainer's step as bench_time wants it. */
static void bench_step_run(void *arg) { train_step(arg); }

/* Tokens a second of optimizer steps on one batch of equal sequences. */
static void bench_train(bench *b, const char *work, const char *name, int batch, int len) {
    bench_forget();
    rlhf_model *m = bench_model(b, name, 0);
    rlhf_dataset *d = bench_data(b, m, RLHF_DATA_SFT, batch, len);
    rlhf_sft_config c = rlhf_sft_config_default();
    c.max_steps = 1000000;
    c.lr_scheduler_type = "constant";
    c.per_device_train_batch_size = batch;
    rlhf_trainer *t = sft_open(m, NULL, d, NULL, &c);
    double s = bench_time(b, bench_step_run, t), tokens = (double)batch * len;
    char full[64];
    snprintf(full, sizeof full, "%s/%.20s/%dx%d/%s", work, name, batch, len, b->dtype);
    bench_add(b, full, tokens / s, "tok/s",
              6 * tokens * bench_macs(m, len / 2.0, 1) / s / 1e9 / b->peak);
    train_free(t);
    data_free(d);
    model_free(m);
}

/* The same with a team of n threads, beside the roof of as many. */
static void bench_threads(bench *b, const char *name, int n) {
    rlhf_ctx *ctx = b->ctx;
    par_team *team = ctx->team;
    int threads = ctx->threads;
    char work[32];
    snprintf(work, sizeof work, "growth/%d-threads", n);
    ctx->threads = n;
    ctx->team = par_new(ctx);
    if (!ctx->team) err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for threads");
    bench_train(b, work, name, 8, 128);
    par_free(ctx);
    ctx->team = team;
    ctx->threads = threads;
}

/* How training grows: with the tokens of a step, with the length of a sequence at as many tokens,
 * and with threads. */
static void bench_growth(bench *b, const char *name) {
    int most = b->quick ? 32 : 512;
    for (int batch = 8; batch <= most; batch *= 4) bench_train(b, "growth", name, batch, 128);
    for (int len = 256; !b->quick && len <= 4096; len *= 4)
        bench_train(b, "growth", name, 4096 / len, len);
    for (int n = 1; n < b->ctx->threads; n *= 2) bench_threads(b, name, n);
    bench_threads(b, name, b->ctx->threads);
}

/* One batch to be continued again and again. */
typedef struct bench_gen_arg {
    rlhf_model *m;
    gen_item *item;
    int n;
    gen_config c;
} bench_gen_arg;

static void bench_gen_run(void *arg) {
    bench_gen_arg *g = arg;
    gen_run(g->m, &g->m->ws, &g->c, g->item, g->n, NULL);
}

/* Tokens a second of decoding from a prompt of 64 tokens, 64 new ones each. */
static void bench_generate(bench *b, const char *name, int batch) {
    rlhf_model *m = bench_model(b, name, 0);
    /* Each token reads all weights once for the whole batch. What is read to measure that is no
     * part of the peak of memory. */
    double bytes = (m->half ? 2.0 : 4.0) * bench_macs(m, 0, 1), read = bench_read(b, bytes);
    bench_forget();
    m->n_eos = 0;
    rlhf_dataset *d = bench_data(b, m, RLHF_DATA_PROMPT, batch, 64);
    gen_item *item = mem_zalloc(b->ctx, (size_t)batch, sizeof *item);
    for (int i = 0; i < batch; i++)
        item[i] = (gen_item){.prompt = d->record[i].a.ids,
                             .n_prompt = 64,
                             .key = (uint64_t)i,
                             .out = mem_temp(mem_alloc(b->ctx, 64 * sizeof(int32_t)))};
    bench_gen_arg g = {m,
                       item,
                       batch,
                       {.max_new = 64, .batch = batch, .temperature = 1, .top_p = 1, .stop = -1}};
    double s = bench_time(b, bench_gen_run, &g), peak = b->peak, tokens = 64.0 * batch;
    g.c.max_new = 1; /* the prompt's share, to be taken off: with panels, as it was in there */
    s -= bench_time(b, bench_gen_run, &g);
    double roof = fmin(peak * 1e9 / (2 * bench_macs(m, 96, 1)), read * 1e9 / bytes * batch);
    char full[64];
    snprintf(full, sizeof full, "generate/%.20s/batch%d/%s", name, batch, b->dtype);
    bench_add(b, full, tokens * 63 / 64 / s, "tok/s", tokens * 63 / 64 / s / roof);
    mem_free(item);
    data_free(d);
    model_free(m);
}

/* A reward that costs nothing: what is measured is the library. */
static rlhf_status bench_no_reward(void *user, const rlhf_sample *samples, int n, float *reward) {
    (void)user, (void)samples;
    for (int i = 0; i < n; i++) reward[i] = (float)(i % 2);
    return RLHF_OK;
}

/* Operations that an update of PPO cannot do without: sampling 48 tokens behind 32, the reference,
 * value and reward model once over the whole, policy and value model trained four times; only
 * states of the answer meet the vocabulary. A shared trunk saves a model's scores and training. */
static double bench_ppo_flops(const rlhf_model *m, int shared) {
    double body = bench_macs(m, 40, 0), head = (double)m->c.vocab * m->c.d;
    double tokens = 16 * 80, answer = 16 * 48, trunks = shared ? 1 : 2;
    double sample = tokens * body + answer * head;
    double score = (1 + trunks) * tokens * body + answer * head;
    return 2 * (sample + score + 4 * 3 * (trunks * tokens * body + answer * head));
}

/* Milliseconds of a whole update: rollout, scores, and the optimizer's steps. */
static void bench_ppo(bench *b, const char *name, int shared) {
    bench_forget();
    rlhf_model *m = bench_model(b, name, 0), *r = bench_model(b, name, 1);
    m->n_eos = 0;
    rlhf_dataset *d = bench_data(b, m, RLHF_DATA_PROMPT, 16, 32);
    rlhf_ppo_config c = rlhf_ppo_config_default();
    c.max_steps = 1000000;
    c.batch_size = 16;
    c.response_length = 48;
    c.num_mini_batches = 4;
    c.shared_trunk = shared;
    rlhf_trainer *t = ppo_open(m, NULL, d, r, bench_no_reward, NULL, &c);
    double s = bench_time(b, bench_step_run, t);
    char full[64];
    snprintf(full, sizeof full, "ppo%s/%.20s/16x(32+48)/%s", shared ? "-shared" : "", name,
             b->dtype);
    bench_add(b, full, 1e3 * s, "ms", bench_ppo_flops(m, shared) / b->peak / 1e9 / s);
    b->hash = model_hash(m);
    train_free(t);
    data_free(d);
    model_free(r);
    model_free(m);
}

/* Three training steps of a small model: equal hashes mean the same work. */
static void bench_hash(bench *b) {
    rlhf_model *m = bench_model(b, "llama-8m", 0);
    rlhf_dataset *d = bench_data(b, m, RLHF_DATA_SFT, 4, 32);
    rlhf_sft_config c = rlhf_sft_config_default();
    c.max_steps = 3;
    rlhf_trainer *t = sft_open(m, NULL, d, NULL, &c);
    for (int i = 0; i < 3; i++) train_step(t);
    b->hash = model_hash(m);
    train_free(t);
    data_free(d);
    model_free(m);
}

/* The geometric mean of the shares of one kind of work, one line each: what two machines, or two
 * versions, are compared by. */
static void bench_scores(bench *b) {
    static const char *const kinds[] = {"gemm/", "train/", "generate/", "ppo/"};
    int n = b->n;
    for (int k = 0; k < 4; k++) {
        double sum = 0;
        int count = 0;
        for (int i = 0; i < n; i++) {
            if (strncmp(b->list[i].name, kinds[k], strlen(kinds[k])) || b->list[i].share <= 0)
                continue;
            sum += log(b->list[i].share);
            count++;
        }
        char name[64];
        snprintf(name, sizeof name, "score/%s%s", kinds[k], b->dtype);
        if (count) bench_add(b, name, 100 * exp(sum / count), "% of roof", exp(sum / count));
    }
}

/* The whole of `rlhf bench`: what is gemm, train, generate, ppo, or all of these; or growth. */
static void bench_run(bench *b, const char *what, const char *model) {
    int all = !strcmp(what, "all"), grow = !strcmp(what, "growth");
    int n = model || grow || b->quick ? 1 : BENCH_ALL;
    if (model) bench_find(b, model); /* a wrong name is told before anything is measured */
    bench_limits(b);
    if (all || !strcmp(what, "gemm")) bench_gemm(b);
    for (int i = 0; i < n && strcmp(what, "gemm"); i++) {
        const char *name = model ? model : bench_shapes[i].name;
        const bench_shape *shape = bench_find(b, name);
        int big = !shape || shape->big;
        if (all || !strcmp(what, "train")) {
            bench_train(b, "train", name, big ? 4 : 8, big ? 64 : 128);
            if (big && !b->quick) bench_train(b, "train", name, 4, 256);
        }
        if (all || !strcmp(what, "generate"))
            for (int batch = 1; batch <= 32; batch *= batch == 1 ? 8 : 4)
                bench_generate(b, name, batch);
        if (grow) bench_growth(b, name);
        for (int shared = 0; shared < (b->quick ? 1 : 2) && (all || !strcmp(what, "ppo")); shared++)
            bench_ppo(b, name, shared);
    }
    bench_scores(b);
    bench_hash(b);
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 35 PAGE (page_)
 * The pages that the program shows in a browser. Their HTML, CSS and JavaScript are the readable
 * files of data/page/; the build turns them into page.h, a table of names and bytes.
 * ============================================================================================ */

#include "page.h"

/* The text of a file of data/page/, *size bytes; such a file is always there. */
static const char *page_text(const char *name, size_t *size) {
    size_t i = 0;
    while (strcmp(page_files[i].name, name)) i++;
    *size = page_files[i].size;
    return (const char *)page_files[i].data;
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 36 REPORT (report_)
 * Runs as one page: what their directories hold (27) becomes one JSON object, which the template
 * data/page/report.html takes in beside its style and script. The page needs no other file and no
 * network. What is drawn is decided there; what is a warning is decided here.
 *
 *     version, rules    texts
 *     raters            a report of `rlhf raters`, or null
 *     runs              a list: name, trainer, command, options (name, value, default, help),
 *                       metrics (by name: lists step and value), eval and best_of_n (as in their
 *                       files, or null), samples (lines of samples.jsonl), warnings, unchecked
 *
 * Entry: report_write.   Tests: test/test_report.c, test/pages_report.py
 * ============================================================================================ */

/* ---- files ---- */

/* Calls take for every line of a file of JSON objects. A last line without its end that is no JSON
 * was cut short, by a crash or because the run is still writing: it does not count. */
static void report_lines(rlhf_ctx *ctx, const char *path, json_t *out,
                         void (*take)(const json_src *src, json_t *line, json_t *out)) {
    size_t len;
    char *text = io_read(ctx, path, IO_LIMIT, &len);
    json_src src = json_source(ctx, path);
    src.status = RLHF_ERR_DATA;
    for (size_t at = 0, n; at < len; at += n + 1) {
        char *end = memchr(text + at, '\n', len - at);
        json_error_t e;
        n = end ? (size_t)(end - text) - at : len - at;
        src.line++;
        if (!end) {
            json_t *whole = json_loadb(text + at, n, JSON_ALLOW_NUL, &e);
            json_decref(whole);
            if (!whole) {
                log_at(ctx, RLHF_LOG_WARNING, "%s:%lld: the last line is cut short and left out",
                       path, (long long)src.line);
                break;
            }
        }
        json_t *j = json_parse(&src, text + at, n);
        if (!json_is_object(j)) json_bad(&src, "line", j, "an object");
        take(&src, j, out);
        err_release(ctx);
    }
    mem_free(text);
}

/* Adds a line of metrics.jsonl to {name: {"step": [], "value": []}}. */
static void report_take_metrics(const json_src *src, json_t *line, json_t *out) {
    json_int_t step = (json_int_t)json_need_int(src, line, "step", 0, (int64_t)1 << 53);
    const char *name;
    json_t *v;
    json_object_foreach(line, name, v) {
        if (!strcmp(name, "step")) continue;
        if (!json_is_number(v) && !json_is_null(v)) json_bad(src, name, v, "a number or null");
        json_t *series = json_object_get(out, name);
        if (!series) {
            series = json_pack("{s:[],s:[]}", "step", "value");
            json_object_set_new(out, name, series);
        }
        json_t *steps = json_object_get(series, "step");
        size_t n = json_array_size(steps);
        if (n && json_integer_value(json_array_get(steps, n - 1)) >= step)
            json_bad(src, "step", json_object_get(line, "step"), "more than in the lines before");
        json_array_append_new(steps, json_integer(step));
        json_array_append(json_object_get(series, "value"), v);
    }
}

/* Adds a line of samples.jsonl to a list. */
static void report_take_sample(const json_src *src, json_t *line, json_t *out) {
    json_need_int(src, line, "step", 0, (int64_t)1 << 53);
    if (!json_is_string(json_get(line, "prompt")))
        json_bad(src, "prompt", json_get(line, "prompt"), "a string");
    if (!json_is_string(json_get(line, "completion")))
        json_bad(src, "completion", json_get(line, "completion"), "a string");
    json_array_append(out, line);
}

/* The object in dir/name, or null if there is no such file. need, if not null: an array or object
 * that it must have, by which its kind is known. Held in either case. */
static json_t *report_object(rlhf_ctx *ctx, const char *path, const char *need, const char *what) {
    if (!path || !io_exists(path)) return json_hold(ctx, json_null());
    json_src src = json_source(ctx, path);
    json_t *j = json_read(&src);
    if (!json_is_object(j)) err_throw(ctx, RLHF_ERR_FORMAT, "%s: expected %s", path, what);
    if (need && !json_is_array(json_get(j, need)) && !json_is_object(json_get(j, need)))
        json_bad(&src, need, json_get(j, need), what);
    return j;
}

/* The points of best_of_n.json, if there are any. */
static json_t *report_frontier(rlhf_ctx *ctx, const char *dir) {
    char *path = ckpt_path(ctx, dir, "best_of_n.json");
    json_t *j = report_object(ctx, path, "points", "a list of points"), *point;
    json_src src = json_source(ctx, path);
    size_t i;
    json_array_foreach(json_object_get(j, "points"), i, point) {
        json_need_int(&src, point, "n", 1, INT_MAX);
        json_need_real(&src, point, "kl");
        json_need_real(&src, point, "score");
        json_need_real(&src, point, "error");
    }
    return j;
}

/* ---- what was run ---- */

/* Appends " --name value", the value as a shell takes it. */
static void report_put_option(tok_buf *b, const char *name, const char *value) {
    static const char safe[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
                               "_-./:=,+@%";
    size_t n = strlen(value);
    tok_put(b, " --", 3);
    tok_put(b, name, strlen(name));
    tok_put(b, " ", 1);
    if (n && strspn(value, safe) == n) {
        tok_put(b, value, n);
        return;
    }
    tok_put(b, "'", 1);
    for (size_t i = 0; i < n; i++)
        if (value[i] == '\'') tok_put(b, "'\\''", 4);
        else tok_put(b, value + i, 1);
    tok_put(b, "'", 1);
}

/* Whether an option's value in run.json is the table's default. */
static int report_is_default(const rlhf_field *f, const json_t *v) {
    if (f->kind == 'S') return json_is_string(v) && !strcmp(json_string_value(v), f->text);
    if (f->kind == 'B') return json_is_boolean(v) && json_is_true(v) == (f->def != 0);
    return json_is_number(v) && json_number_value(v) == f->def;
}

/* One row of "options", also an option of the command. Takes the reference to def, which may be
 * null. */
static void report_add_option(rlhf_ctx *ctx, tok_buf *command, json_t *options, const char *name,
                              json_t *v, json_t *def, const char *help) {
    char text[64];
    def = json_hold(ctx, def ? def : json_null());
    if (json_is_real(v)) snprintf(text, sizeof text, "%.12g", json_number_value(v));
    else if (!json_is_string(v)) json_show(v, text, sizeof text);
    report_put_option(command, name, json_is_string(v) ? json_string_value(v) : text);
    if (json_array_append_new(options, json_pack("{s:s,s:O,s:O,s:s}", "name", name, "value", v,
                                                 "default", def, "help", help)))
        err_throw(ctx, RLHF_ERR_MEMORY, "out of memory for a JSON value");
    err_release(ctx);
}

/* "command" and "options" of a run: what it read, then every option that is not at its default. */
static void report_put_command(rlhf_ctx *ctx, json_t *out, const char *dir, const json_t *run) {
    static const struct {
        const char *name, *help;
    } inputs[] = {{"model", "the model it began with"},
                  {"init", "the shape of the new model it began with"},
                  {"tokenizer", "the tokenizer"},
                  {"reward", "the reward model"},
                  {"data", "records"},
                  {"eval_data", "records for evaluation"},
                  {"chat_template", "how conversations are rendered"},
                  {"dtype", "numbers that matrix products multiply"}};
    const char *trainer = json_string_value(json_object_get(run, "trainer"));
    const rlhf_config_kind kind = trainer[0] == 's'   ? RLHF_CONFIG_SFT
                                  : trainer[0] == 'r' ? RLHF_CONFIG_RM
                                                      : RLHF_CONFIG_PPO;
    json_t *options = json_array();
    tok_buf command = {.ctx = ctx};
    json_object_set_new(out, "options", options);
    tok_put(&command, "rlhf ", 5);
    tok_put(&command, trainer, strlen(trainer));
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        json_t *v = json_get(run, inputs[i].name);
        int f32 = !strcmp(inputs[i].name, "dtype");
        if (!json_is_string(v) || (f32 && !strcmp(json_string_value(v), "f32"))) continue;
        report_add_option(ctx, &command, options, inputs[i].name, v,
                          f32 ? json_string("f32") : NULL, inputs[i].help);
    }
    for (int i = 0; i < train_tables[kind].n; i++) {
        const rlhf_field *f = train_tables[kind].row + i;
        json_t *v = json_get(run, f->name);
        if (!v || report_is_default(f, v) || !strcmp(f->name, "output_dir")) continue;
        json_t *def = f->kind == 'S'   ? json_string(f->text)
                      : f->kind == 'B' ? json_boolean(f->def != 0)
                                       : json_real(f->def);
        report_add_option(ctx, &command, options, f->name, v, def, f->help);
    }
    report_put_option(&command, "out", dir);
    json_object_set_new(out, "command", json_stringn(command.p, command.n));
    mem_free(command.p);
}

/* ---- warnings ---- */

/* Lines of metrics that a trend needs. */
enum { REPORT_LINES = 10 };

/* How a metric ends against how it began: means of the last and the first fifth of its lines. It
 * has changed if they differ by more than twice the standard error of that difference. */
typedef struct report_trend {
    int n; /* finite values; below REPORT_LINES nothing else is known */
    double early, late;
    int changed;
} report_trend;

static report_trend report_trend_of(rlhf_ctx *ctx, const json_t *metrics, const char *name) {
    const json_t *value = json_object_get(json_object_get(metrics, name), "value");
    size_t lines = json_array_size(value);
    double *x = mem_alloc(ctx, (lines + 1) * sizeof *x), var = 0;
    report_trend t = {0};
    for (size_t i = 0; i < lines; i++)
        if (json_is_number(json_array_get(value, i)))
            x[t.n++] = json_number_value(json_array_get(value, i));
    if (t.n >= REPORT_LINES) {
        int k = t.n / 5;
        for (int i = 0; i < k; i++) t.early += x[i] / k, t.late += x[t.n - 1 - i] / k;
        for (int i = 0; i < k; i++) {
            double a = x[i] - t.early, b = x[t.n - 1 - i] - t.late;
            var += (a * a + b * b) / (k - 1) / k;
        }
        t.changed = fabs(t.late - t.early) > 2 * sqrt(var);
    }
    mem_free(x);
    return t;
}

/* What must not change while the reward rises: by more than `by`, a share of how it began or, for
 * what is itself a share, points of it. Either direction counts for the length alone. */
static const struct {
    const char *metric, *what, *rule;
    double by;
    int relative;
} report_drifts[] = {
    {"completions/mean_length", "answers went from %.3g to %.3g tokens",
     "completions/mean_length has changed by more than 20 % of what it was, up or down", 0.2, 1},
    {"completions/repetition", "the share of repeated three-token runs went from %.3g to %.3g",
     "completions/repetition has risen by more than 0.05", 0.05, 0},
    {"completions/clipped_ratio", "the share of answers without an end went from %.3g to %.3g",
     "completions/clipped_ratio has risen by more than 0.05", 0.05, 0}};
enum { REPORT_DRIFTS = sizeof report_drifts / sizeof *report_drifts };

/* An evaluation loss that ends so much above its lowest value is a warning, too. */
#define REPORT_OVERFIT 0.02

/* The rules of warnings as the page states them. */
static json_t *report_rules(void) {
    json_t *list = json_array();
    json_array_append_new(
        list, json_sprintf("Early and late are the means of the first and of the last fifth of a "
                           "metric's lines, of which there must be %d. A metric has changed if "
                           "late and early differ by more than twice the standard error of their "
                           "difference.",
                           (int)REPORT_LINES));
    for (int i = 0; i < REPORT_DRIFTS; i++)
        json_array_append_new(list,
                              json_sprintf("objective/scores has risen, and %s.",
                                           report_drifts[i].rule));
    json_array_append_new(list, json_sprintf("The last eval_loss is more than %.0f %% above the "
                                             "lowest one before.",
                                             100 * REPORT_OVERFIT));
    return list;
}

/* A warning if eval_loss rose again after its lowest value. */
static void report_warn_overfit(const json_t *metrics, json_t *warnings) {
    const json_t *series = json_object_get(metrics, "eval_loss");
    const json_t *value = json_object_get(series, "value"), *step = json_object_get(series, "step");
    size_t least = 0, i;
    double low = INFINITY, last = NAN;
    json_t *v;
    json_array_foreach((json_t *)(uintptr_t)value, i, v) {
        last = json_is_number(v) ? json_number_value(v) : NAN;
        if (last < low) low = last, least = i;
    }
    if (last > low + REPORT_OVERFIT * fabs(low))
        json_array_append_new(
            warnings,
            json_sprintf("eval_loss was lowest at step %lld (%.4g) and ends at %.4g: further "
                         "training made the model worse on what it is not trained on.",
                         (long long)json_integer_value(json_array_get(step, least)), low, last));
}

/* "warnings" of a run, and what could not be checked. */
static void report_put_warnings(rlhf_ctx *ctx, json_t *out) {
    const char *trainer = json_string_value(json_object_get(out, "trainer"));
    const json_t *metrics = json_object_get(out, "metrics");
    json_t *warnings = json_array(), *unchecked = json_array();
    json_object_set_new(out, "warnings", warnings);
    json_object_set_new(out, "unchecked", unchecked);
    report_warn_overfit(metrics, warnings);
    if (strcmp(trainer, "ppo")) return;
    report_trend reward = report_trend_of(ctx, metrics, "objective/scores");
    for (int i = 0; i < REPORT_DRIFTS; i++) {
        report_trend t = report_trend_of(ctx, metrics, report_drifts[i].metric);
        if (base_min(t.n, reward.n) < REPORT_LINES) {
            json_array_append_new(unchecked,
                                  json_sprintf("%s: %d lines of it, %d of objective/scores",
                                               report_drifts[i].metric, t.n, reward.n));
            continue;
        }
        double change = t.late - t.early;
        if (report_drifts[i].relative) change = fabs(change) / fmax(fabs(t.early), 1e-12);
        if (!reward.changed || reward.late < reward.early || !t.changed ||
            change <= report_drifts[i].by)
            continue;
        char what[160];
        snprintf(what, sizeof what, report_drifts[i].what, t.early, t.late);
        json_array_append_new(warnings,
                              json_sprintf("The reward rose from %.3g to %.3g while %s.",
                                           reward.early, reward.late, what));
    }
}

/* ---- a run ---- */

/* Everything about one run directory, held. */
static json_t *report_run(rlhf_ctx *ctx, const char *dir) {
    char *path = ckpt_path(ctx, dir, "run.json");
    if (!io_exists(path))
        err_throw(ctx, RLHF_ERR_IO,
                  "%s: not a run directory: there is no run.json in it, which rlhf sft, rm and ppo "
                  "write",
                  dir);
    json_src src = json_source(ctx, path);
    json_t *out = json_hold(ctx, json_object()), *run = json_read(&src);
    if (!json_is_object(run)) err_throw(ctx, RLHF_ERR_FORMAT, "%s: expected an object", path);
    const char *trainer = json_need_str(&src, run, "trainer");
    if (!base_is_choice("sft|rm|ppo", trainer))
        json_bad(&src, "trainer", json_get(run, "trainer"), "sft, rm or ppo");
    json_object_set_new(out, "trainer", json_string(trainer));
    report_put_command(ctx, out, dir, run);
    err_release(ctx);
    json_t *metrics = json_object(), *samples = json_array();
    json_object_set_new(out, "metrics", metrics);
    json_object_set_new(out, "samples", samples);
    report_lines(ctx, ckpt_path(ctx, dir, "metrics.jsonl"), metrics, report_take_metrics);
    path = ckpt_path(ctx, dir, "samples.jsonl");
    if (io_exists(path)) report_lines(ctx, path, samples, report_take_sample);
    json_object_set(out, "best_of_n", report_frontier(ctx, dir));
    err_release(ctx);
    json_object_set(out, "eval", report_object(ctx, ckpt_path(ctx, dir, "eval.json"), NULL,
                                               "an object, as `rlhf eval --json` prints it"));
    err_release(ctx);
    report_put_warnings(ctx, out);
    return out;
}

/* The last part of a path, *len bytes. */
static const char *report_base(const char *dir, size_t *len) {
    size_t end = strlen(dir), at;
    while (end > 1 && dir[end - 1] == '/') end--;
    for (at = end; at && dir[at - 1] != '/';) at--;
    *len = end - at;
    return dir + at;
}

/* Runs are called by the last part of their paths, or by the whole where others end in the same. */
static void report_put_names(json_t *runs, const char *const *dirs, int n) {
    for (int i = 0; i < n; i++) {
        size_t len, other;
        const char *name = report_base(dirs[i], &len);
        int same = 0;
        for (int k = 0; k < n; k++) {
            const char *base = report_base(dirs[k], &other);
            same += len == other && !memcmp(name, base, len);
        }
        json_object_set_new(json_array_get(runs, (size_t)i), "name",
                            same > 1 ? json_string(dirs[i]) : json_stringn(name, len));
    }
}

/* ---- the page ---- */

/* Everything that the page shows, held. raters: a report of `rlhf raters --json`, may be null. */
static json_t *report_collect(rlhf_ctx *ctx, const char *const *dirs, int n, const char *raters) {
    json_t *data = json_hold(ctx, json_object()), *runs = json_array();
    json_object_set_new(data, "version", json_string(RLHF_VERSION));
    json_object_set_new(data, "rules", report_rules());
    json_object_set_new(data, "runs", runs);
    for (int i = 0; i < n; i++) {
        json_array_append(runs, report_run(ctx, dirs[i]));
        err_release(ctx);
    }
    report_put_names(runs, dirs, n);
    if (raters && !io_exists(raters)) io_fail(ctx, "read", raters, ENOENT);
    json_object_set(data, "raters", report_object(ctx, raters, "annotator",
                                                  "what `rlhf raters --json` prints"));
    err_release(ctx);
    return data;
}

/* Writes JSON such that a browser finds no tag in it: '<' stands only inside of strings. */
static void report_put_data(io_file *f, const char *text, size_t n) {
    for (size_t at = 0; at < n;) {
        const char *mark = memchr(text + at, '<', n - at);
        size_t len = mark ? (size_t)(mark - text) - at : n - at;
        io_write(f, text + at, len);
        if (mark) io_write(f, "\\u003c", 6);
        at += len + (mark != NULL);
    }
}

/* Writes the page of n run directories as a whole file. *warnings becomes their number; the log
 * tells each. The template's {{NAME}} are the other files of the page, {{data}} is the JSON. */
static void report_write(rlhf_ctx *ctx, const char *const *dirs, int n, const char *raters,
                         const char *path, int *warnings) {
    json_t *data = report_collect(ctx, dirs, n, raters), *run, *text;
    size_t i, k, size, len;
    *warnings = 0;
    json_array_foreach(json_object_get(data, "runs"), i, run)
        json_array_foreach(json_object_get(run, "warnings"), k, text) {
            log_at(ctx, RLHF_LOG_WARNING, "%s: %s", dirs[i], json_string_value(text));
            ++*warnings;
        }
    char *json = json_text(ctx, data, JSON_COMPACT, &len);
    const char *at = page_text("report.html", &size), *end = at + size, *mark;
    io_file *f = io_create(ctx, path);
    for (; at < end; at = mark) {
        const char *open = at, *part;
        while (open + 1 < end && (open[0] != '{' || open[1] != '{')) open++;
        mark = open + 1 < end ? strstr(open, "}}") : NULL;
        if (!mark) break;
        io_write(f, at, (size_t)(open - at));
        char *name = mem_strndup(ctx, open + 2, (size_t)(mark - open) - 2);
        if (!strcmp(name, "data")) report_put_data(f, json, len);
        else part = page_text(name, &size), io_write(f, part, size);
        mem_free(name);
        mark += 2;
    }
    io_write(f, at, (size_t)(end - at));
    io_commit(f);
    mem_free(json);
    err_release(ctx);
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 37 LABEL (label_)
 * Judgements of people: what there is to judge, who judges it, what comes next for whom, and the
 * file that keeps what they said. How they are asked, by browser or terminal, is 39's.
 *
 * The file is the state. Each judgement is one line, on the disk before anybody is told so; what is
 * done, whom to ask what, and who is qualified are found again from the file, so that a program
 * that was killed goes on. Half a line at its end, which nobody was told of, is cut off. Beside the
 * file lie OUT.tokens, the links, and OUT.items, what was sampled.
 *
 * An item is a prompt with two answers, or a prompt to write for. Its id is a hash of its texts.
 * Which answer an annotator sees first, and when a gold item comes, are functions of seed, name and
 * id or count; nothing is drawn that a restart would draw again.
 *
 * Memory is malloc's and jansson's, since most of it outlives the calls of the library.
 * Entry: label_open, label_next, label_judge, label_undo, label_sync; label_sample.
 * Invariant: what label_sync was called after is on the disk; the file holds whole lines.
 * Tests: test/test_label.c
 * ============================================================================================ */

#include <sys/file.h>

#define LABEL_FIELDS(F)                                                                            \
    F(S, prompts, "", 0, 0, "records whose prompts --model answers (task write: people do)")       \
    F(S, pairs, "", 0, 0, "records with answers: preferences, or a prompt and \"answers\"")        \
    F(S, model2, "", 0, 0, "second checkpoint: half of the answers are its")                       \
    F(I, num_answers, 2, 2, 16, "answers sampled for each prompt; all pairs of them are judged")   \
    F(I, max_new_tokens, 64, 1, 1e6, "longest sampled answer in tokens")                           \
    F(R, temperature, 1.0, 0, 1e3, "temperature of sampling")                                      \
    F(I, top_k, 0, 0, 1e9, "sample among the k most likely tokens; 0 = all")                       \
    F(R, top_p, 1.0, 1e-6, 1, "sample among the most likely tokens that hold this share")          \
    F(I, batch_size, 8, 1, 1e6, "answers sampled at once, while the page is served")               \
    F(S, annotators, "", 0, 0,                                                                     \
      "JSON list of objects with name and, if wanted, kind, domains and token")                    \
    F(S, annotator, "me", 0, 0, "who judges, without --annotators or with --tty")                  \
    F(S, task, "compare", "compare|write", 0, "judge two answers, or write one")                   \
    F(B, draft, 0, 0, 1, "task write: --model drafts an answer to correct")                        \
    F(I, per_item, 1, 1, 1e6, "judgements of each item, by as many people")                        \
    F(S, gold, "", 0, 0, "records with the right answer, mixed in")                                \
    F(I, gold_every, 10, 2, 1e6, "one item in so many is a gold one, or more where items are few") \
    F(S, qualify, "", 0, 0,                                                                        \
      "N:SHARE: first N gold items in a domain; judgements count once SHARE of them are right")    \
    F(S, aspects, "", 0, 0, "also compare by these, separated by commas: accuracy,nuance,safety")  \
    F(S, guidelines, "", 0, 0, "text file that annotators can read beside the items")              \
    F(S, host, "127.0.0.1", 0, 0,                                                                  \
      "address to listen on; by default other machines cannot reach it")                           \
    F(I, port, 8800, 0, 65535, "port to listen on; 0 = any free one")                              \
    F(B, tty, 0, 0, 1, "ask here, in the terminal, instead of in a browser")                       \
    F(B, exit_when_done, 0, 0, 1, "end when there is nothing left to judge")                       \
    F(I, seed, 42, 0, 9e15, "seed of sampling and of the order in which answers are shown")

typedef struct label_config {
    LABEL_FIELDS(RLHF_MEMBER_)
} label_config;

#define LABEL_ROW(kind, ...) TRAIN_FIELD_##kind(label_config, __VA_ARGS__)
static const rlhf_field label_fields[] = {LABEL_FIELDS(LABEL_ROW)};

enum {
    LABEL_TOKEN = 32,   /* characters of a token that is made here: 128 random bits */
    LABEL_SHORTEST = 16, /* of one that the operator gives */
    LABEL_LONGEST = 64,
    LABEL_NAMES = 40,    /* characters of a name in a link's line */
    LABEL_LEASE = 900,   /* seconds after which an item somebody looks at may go to another */
    LABEL_REASON = 10000, /* bytes */
    LABEL_TEXT = 500000   /* bytes of a text that an annotator writes */
};

/* What there is to judge. JSON values are owned. */
typedef struct label_item {
    char id[17];
    json_t *prompt, *answers;  /* answers null: a text is to be written */
    json_t *item, *domain;     /* what the record calls itself; its domain; null: none */
    json_t *sources, *draft;   /* model and sampling of each answer; null: none */
    int round, gold;           /* round of sampling, 0: given; the right answer, -1: not known */
    int counted, leased;       /* judgements that count; annotators who look at it now */
    int crowd;                 /* annotators who may be given it */
    double doubt;              /* |difference of rewards|: small is uncertain; unknown is last */
} label_item;

/* One judgement as far as it is remembered. */
typedef struct label_vote {
    int item;      /* -1: of no item that is known now */
    int right;     /* of a gold item: 0 or 1; else -1 */
    int counts;    /* towards per_item */
    double seconds;
    off_t at; /* its line in the file */
    size_t size;
} label_vote;

/* How an annotator did on gold items of a domain. */
typedef struct label_vet {
    const char *domain; /* an item's or a static text */
    int n, right, passed;
    int ahead; /* items of the domain are left: of label_progress alone */
} label_vet;

typedef struct label_who {
    char *name, *kind; /* kind may be null */
    json_t *domains;   /* null: all */
    char token[LABEL_LONGEST + 1];
    int invited; /* 0: known from the file only, without a link */
    int current; /* the item that is shown; -1: none */
    int leased;  /* whether that item counts it among those who look */
    double since;
    unsigned char *seen; /* [n_seen] items judged */
    int n_seen;
    label_vote *vote; /* in order of time */
    int n_votes, cap_votes;
    label_vet *vet;
    int n_vets, cap_vets;
    double allowance, counted_at; /* of requests (39) */
} label_who;

typedef struct label {
    rlhf_ctx *ctx;
    const label_config *c;
    const char *out;
    int write; /* texts are asked for, not choices */
    label_item *item;
    int n_items, cap_items;
    int *order; /* of items, as they are handed out */
    label_who *who;
    int n_whos, cap_whos;
    json_t *ids, *names; /* id -> item, name -> annotator */
    json_t *aspects;     /* names */
    char *guidelines, operator_token[LABEL_LONGEST + 1];
    int n_gold, gold_every, qualify;
    double share;
    int fd; /* the file, appended to and locked */
    off_t size;
    int dirty;       /* lines written and not yet synced */
    int judgements;  /* in the file */
    char error[512]; /* of the last refusal */
    struct label_sampler *sampler; /* null: nothing is sampled */
} label;

/* Where items come from when a model answers the prompts. */
typedef struct label_sampler {
    rlhf_model *model[2], *reward;
    const char *dir[2];
    char hash[2][17];
    rlhf_tokenizer *tok, *reward_tok;
    const char *chat_template;
    rlhf_dataset *prompts;
    int next, round, fd;
    json_t *done; /* "ROUND PROMPT" -> true */
} label_sampler;

/* What rater_each hands on: the label, and what the file is read for. */
typedef struct label_source {
    rater_set set;
    label *l;
    int gold, sampled;
    const char *text; /* of the file of judgements: where the line of number `line` begins */
    int64_t line;
    off_t at;
} label_source;

/* ---- small things ---- */

/* Room for one more in an array of n. Without memory the program ends: all that anybody was told is
 * saved is on the disk. */
static void *label_grow(void *p, int n, int *cap, size_t size) {
    if (n < *cap) return p;
    *cap = *cap ? 2 * *cap : 16;
    p = realloc(p, (size_t)*cap * size);
    if (!p) {
        fprintf(stderr, "rlhf: out of memory\n");
        exit(1);
    }
    return p;
}

/* Refuses what was asked for; status is one of HTTP. */
RLHF_PRINTF(3, 4)
static int label_refuse(label *l, int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(l->error, sizeof l->error, format, args);
    va_end(args);
    return status;
}

static uint64_t label_hash_text(uint64_t h, const char *text) {
    for (; text && *text; text++) h = rng_mix(h ^ (unsigned char)*text) + 1;
    return rng_mix(h + 0x9e3779b97f4a7c15u);
}

static uint64_t label_hash_json(uint64_t h, const json_t *v) {
    char *text = v ? json_dumps(v, JSON_COMPACT | JSON_SORT_KEYS | JSON_ENCODE_ANY) : NULL;
    h = label_hash_text(h, text);
    free(text);
    return h;
}

/* The id of an item: the same for both orders of its answers. */
static void label_id(const json_t *item, const json_t *prompt, const json_t *answers, char id[17]) {
    uint64_t h = label_hash_json(label_hash_json(1, item), prompt), pair = 0;
    for (size_t i = 0; i < json_array_size(answers); i++)
        pair += label_hash_json(2, json_array_get(answers, i));
    snprintf(id, 17, "%016llx", (unsigned long long)rng_mix(h ^ pair));
}

static const char *label_domain(const label_item *item) {
    return item->domain ? json_string_value(item->domain) : "-";
}

/* Whether an annotator may be given an item. */
static int label_may(const label_who *who, const label_item *item) {
    size_t i;
    json_t *v;
    if (!who->domains || !item->domain) return 1;
    json_array_foreach(who->domains, i, v) if (json_equal(v, item->domain)) return 1;
    return 0;
}

static int label_seen(const label_who *who, int item) {
    return item < who->n_seen && who->seen[item];
}

static void label_set_seen(label_who *who, int item, int seen) {
    int cap = who->n_seen;
    while (cap <= item) {
        who->seen = label_grow(who->seen, cap, &cap, 1);
        memset(who->seen + who->n_seen, 0, (size_t)(cap - who->n_seen));
        who->n_seen = cap;
    }
    who->seen[item] = (unsigned char)seen;
}

/* The annotator of a name, a new one for a new name. */
static label_who *label_who_of(label *l, const char *name) {
    const json_t *known = json_object_get(l->names, name);
    if (known) return l->who + json_integer_value(known);
    l->who = label_grow(l->who, l->n_whos, &l->cap_whos, sizeof *l->who);
    l->who[l->n_whos] = (label_who){.name = strdup(name), .current = -1};
    json_object_set_new(l->names, name, json_integer(l->n_whos));
    return l->who + l->n_whos++;
}

/* Whether an annotator sees the second answer first. */
static int label_flip(const label *l, const label_who *who, const label_item *item) {
    uint64_t key = label_hash_text(label_hash_text(3, who->name), item->id);
    return (int)(rng_u64((uint64_t)l->c->seed, RNG_LABEL, key) & 1);
}

/* What comes back with a judgement, and shows that its item was handed out to this annotator. It
 * holds after a restart, too, so that what was on the page then can still be sent. */
static void label_item_token(const label_who *who, const label_item *item, char token[17]) {
    uint64_t h = label_hash_text(label_hash_text(4, who->token), item->id);
    snprintf(token, 17, "%016llx", (unsigned long long)h);
}

static label_vet *label_vet_of(label_who *who, const char *domain) {
    for (int i = 0; i < who->n_vets; i++)
        if (!strcmp(who->vet[i].domain, domain)) return who->vet + i;
    who->vet = label_grow(who->vet, who->n_vets, &who->cap_vets, sizeof *who->vet);
    who->vet[who->n_vets] = (label_vet){.domain = domain};
    return who->vet + who->n_vets++;
}

static int label_qualified(const label *l, label_who *who, const label_item *item) {
    return !l->qualify || label_vet_of(who, label_domain(item))->passed;
}

/* ---- judgements in memory ---- */

/* Takes a judgement into account. Who once had the share of gold items right stays qualified. */
static void label_count(label *l, label_who *who, const label_vote *v) {
    if (v->item < 0) return;
    label_set_seen(who, v->item, 1);
    label_item *item = l->item + v->item;
    item->counted += v->counts;
    if (v->right < 0) return;
    label_vet *vet = label_vet_of(who, label_domain(item));
    vet->n++;
    vet->right += v->right;
    vet->passed |= vet->n >= l->qualify && vet->right >= l->share * vet->n;
}

static void label_add_vote(label *l, label_who *who, label_vote v) {
    who->vote = label_grow(who->vote, who->n_votes, &who->cap_votes, sizeof *who->vote);
    who->vote[who->n_votes++] = v;
    l->judgements++;
    label_count(l, who, &v);
}

/* Forgets the last judgement of an annotator. */
static void label_drop_vote(label *l, label_who *who) {
    label_vote *gone = who->vote + --who->n_votes;
    l->judgements--;
    if (gone->item >= 0) label_set_seen(who, gone->item, 0);
    /* Qualification depends on the order of what is left: count it again from nothing. */
    for (int i = 0; i < who->n_votes; i++)
        if (who->vote[i].item >= 0) l->item[who->vote[i].item].counted -= who->vote[i].counts;
    if (gone->item >= 0) l->item[gone->item].counted -= gone->counts;
    who->n_vets = 0;
    for (int i = 0; i < who->n_votes; i++) label_count(l, who, who->vote + i);
}

/* ---- who is asked what ---- */

/* Items that somebody has looked at for too long may go to others. */
static void label_lapse(label *l, double now) {
    for (int w = 0; w < l->n_whos; w++) {
        label_who *who = l->who + w;
        if (!who->leased || now - who->since < LABEL_LEASE) continue;
        l->item[who->current].leased--;
        who->leased = 0;
    }
}

static void label_release(label *l, label_who *who) {
    if (who->leased) l->item[who->current].leased--;
    who->leased = 0;
    who->current = -1;
}

static int label_show_next(label *l, label_who *who, int item, double now) {
    label_release(l, who);
    who->current = item;
    who->since = now;
    who->leased = 1;
    l->item[item].leased++;
    return item;
}

/* The first item in order that has room for another judgement by this annotator; -1: none. all:
 * also those that others look at. */
static int label_pick(const label *l, const label_who *who, int all) {
    for (int k = 0; k < l->n_items; k++) {
        int i = l->order[k];
        const label_item *item = l->item + i;
        if (item->gold < 0 && !label_seen(who, i) && label_may(who, item) &&
            item->counted + (all ? 0 : item->leased) < l->c->per_item)
            return i;
    }
    return -1;
}

/* A gold item of a domain (null: of any) that the annotator has not seen, drawn; -1: none. */
static int label_pick_gold(const label *l, const label_who *who, const char *domain) {
    int best = -1;
    uint64_t least = 0;
    for (int i = 0; i < l->n_items; i++) {
        const label_item *item = l->item + i;
        if (item->gold < 0 || label_seen(who, i) || !label_may(who, item) ||
            (domain && strcmp(domain, label_domain(item))))
            continue;
        uint64_t key = label_hash_text(label_hash_text(5, who->name), item->id);
        key = rng_u64((uint64_t)l->c->seed, RNG_LABEL, key);
        if (best < 0 || key < least) best = i, least = key;
    }
    return best;
}

/* Whether the annotator's item after n others is a gold one: one in each run of gold_every, at a
 * place that is drawn. */
static int label_gold_due(const label *l, const label_who *who, int n) {
    if (!l->n_gold) return 0;
    uint64_t run = (uint64_t)(n / l->gold_every);
    uint64_t drawn = rng_u64((uint64_t)l->c->seed ^ label_hash_text(6, who->name), RNG_LABEL, run);
    return n % l->gold_every == (int)(drawn % (uint64_t)l->gold_every);
}

/* The item to show to annotator w, the same one until it is judged; -1: there is none now. */
static int label_next(label *l, int w) {
    label_who *who = l->who + w;
    double now = base_now();
    label_lapse(l, now);
    if (who->current >= 0) return label_show_next(l, who, who->current, now);
    int item = label_pick(l, who, 0), gold = -1;
    if (item < 0) return -1;
    if (l->qualify && label_vet_of(who, label_domain(l->item + item))->n < l->qualify)
        gold = label_pick_gold(l, who, label_domain(l->item + item));
    else if (label_gold_due(l, who, who->n_votes)) gold = label_pick_gold(l, who, NULL);
    return label_show_next(l, who, gold >= 0 ? gold : item, now);
}

#ifndef RLHF_NO_HTTP
/* Whether nobody has anything left to do. */
static int label_done(const label *l) {
    if (l->sampler && l->sampler->next < l->sampler->prompts->n) return 0;
    for (int w = 0; w < l->n_whos; w++)
        if (l->who[w].invited && (l->who[w].current >= 0 || label_pick(l, l->who + w, 1) >= 0))
            return 0;
    return 1;
}
#endif

/* How many gold items come to an annotator among so many others, the first of them to qualify. */
static int label_gold_ahead(const label *l, const label_who *who, int others, int first) {
    int unseen = 0, gold = 0;
    for (int i = 0; i < l->n_items && l->n_gold; i++)
        unseen += l->item[i].gold >= 0 && !label_seen(who, i) && label_may(who, l->item + i);
    for (int n = who->n_votes; others > 0 && gold < unseen; n++)
        if (gold < first || label_gold_due(l, who, n)) gold++;
        else others--;
    return gold;
}

/* Done, and what can be expected: an equal share of what is left, with the gold items on the way.
 * Without these the total would grow whenever one is judged, and tell which they were. */
static json_t *label_progress(label *l, int w) {
    label_who *who = l->who + w;
    double left = 0;
    int first = 0;
    for (int i = 0; i < who->n_vets; i++) who->vet[i].ahead = 0;
    for (int i = 0; i < l->n_items; i++) {
        const label_item *item = l->item + i;
        int open = (int)l->c->per_item - item->counted;
        if (item->gold >= 0 || open <= 0 || label_seen(who, i) || !label_may(who, item)) continue;
        left += fmin(1, (double)open / base_max(item->crowd, 1));
        label_vet *vet = l->qualify ? label_vet_of(who, label_domain(item)) : NULL;
        if (!vet || vet->ahead) continue;
        vet->ahead = 1;
        first += base_max(l->qualify - vet->n, 0);
    }
    int more = (int)ceil(left - 1e-9);
    if (who->current >= 0 && !more) more = 1;
    more += label_gold_ahead(l, who, more, first);
    json_t *j = json_pack("{s:i,s:i}", "done", who->n_votes, "total", who->n_votes + more);
    if (l->qualify) {
        json_t *q = json_object();
        for (int i = 0; i < who->n_vets; i++)
            json_object_set_new(q, who->vet[i].domain, json_boolean(who->vet[i].passed));
        json_object_set_new(j, "qualified", q);
    }
    return j;
}

/* ---- what is shown ---- */

/* An answer as one text; of several turns those after the first bear their role. */
static json_t *label_text_of(const json_t *answer) {
    if (json_is_string(answer)) return json_string(json_string_value(answer));
    char *text = NULL;
    size_t size = 0, i;
    FILE *f = open_memstream(&text, &size);
    json_t *turn;
    json_array_foreach((json_t *)(uintptr_t)answer, i, turn) {
        if (i) fprintf(f, "\n\n[%s]\n", json_string_value(json_object_get(turn, "role")));
        fputs(json_string_value(json_object_get(turn, "content")), f);
    }
    fclose(f);
    json_t *v = json_string(text);
    free(text);
    return v;
}

/* The item as annotator w is to see it. */
static json_t *label_show(const label *l, int w, int i) {
    const label_item *item = l->item + i;
    const label_who *who = l->who + w;
    int flip = label_flip(l, who, item);
    char token[17];
    label_item_token(who, item, token);
    json_t *j = json_pack("{s:s,s:s,s:s}", "id", item->id, "token", token, "domain",
                          item->domain ? json_string_value(item->domain) : "");
    if (json_is_string(item->prompt))
        json_object_set_new(j, "prompt", json_pack("[{s:s,s:O}]", "role", "text", "content",
                                                   item->prompt));
    else json_object_set(j, "prompt", item->prompt);
    for (size_t k = 0; k < 2 && item->answers; k++) {
        if (!k) json_object_set_new(j, "answers", json_array());
        json_array_append_new(json_object_get(j, "answers"),
                              label_text_of(json_array_get(item->answers, k ^ (size_t)flip)));
    }
    if (item->draft) json_object_set(j, "draft", item->draft);
    return j;
}

/* ---- the file ---- */

/* The place of a text among the first n words of a choice; -1: none. */
static const char *const label_words[] = {"A", "B", "tie", "both_bad", "skip"};
enum { LABEL_TIE = 2, LABEL_SKIP = 4, LABEL_WORDS = 5 };
static int label_word(const json_t *v, int n) {
    const char *text = json_string_value(v);
    for (int i = 0; text && i < n; i++)
        if (!strcmp(text, label_words[i])) return i;
    return -1;
}

/* A choice between what was shown as one between the item's answers, or the reverse. */
static int label_turn(int word, int flip) { return word < LABEL_TIE ? word ^ flip : word; }

/* Whether a record has an item's answers in the other order; the operator's files may change. */
static int label_turned(const label_item *item, const json_t *record) {
    return item->answers && !json_equal(json_array_get(json_object_get(record, "answers"), 0),
                                        json_array_get(item->answers, 0));
}

/* Writes a whole line, or leaves the file as it was. Returns an errno. */
static int label_append(label *l, const char *line, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t got = write(l->fd, line + done, n - done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            int error = got < 0 ? errno : EIO;
            if (ftruncate(l->fd, l->size)) return error;
            return error;
        }
        done += (size_t)got;
    }
    l->size += (off_t)n;
    l->dirty = 1;
    return 0;
}

/* What was written is on the disk when this returns 0; else an errno, and nothing is known. */
static int label_sync(label *l) {
    if (l->dirty && fsync(l->fd)) return errno;
    l->dirty = 0;
    return 0;
}

/* Writes a judgement and takes it into account. */
static int label_commit(label *l, int w, int i, json_t *record, label_vote v) {
    label_who *who = l->who + w;
    char *text = json_dumps(record, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(record);
    size_t n = text ? strlen(text) : 0;
    if (!text) return label_refuse(l, 500, "out of memory");
    text[n] = '\n';
    v.at = l->size;
    v.size = n + 1;
    int error = label_append(l, text, n + 1);
    free(text);
    if (error) return label_refuse(l, 500, "%s: cannot write: %s", l->out, strerror(error));
    v.item = i;
    if (who->current == i) label_release(l, who);
    label_add_vote(l, who, v);
    return 200;
}

/* The file without the bytes [at, at + n), whole at any moment. */
static rlhf_status label_cut(label *l, off_t at, size_t n) {
    API_ENTER(l->ctx);
    size_t len;
    char *text = io_read(l->ctx, l->out, IO_LIMIT, &len);
    io_file *f = io_create(l->ctx, l->out);
    struct stat mode;
    if (!fstat(l->fd, &mode)) (void)!fchmod(fileno(f->stream), mode.st_mode & 0777);
    io_write(f, text, (size_t)at);
    io_write(f, text + at + n, len - (size_t)at - n);
    io_commit(f);
    int fd = open(l->out, O_RDWR | O_APPEND | O_CLOEXEC);
    if (fd < 0) io_fail(l->ctx, "open", l->out, errno);
    (void)flock(fd, LOCK_EX | LOCK_NB);
    close(l->fd);
    l->fd = fd;
    l->size = (off_t)(len - n);
    l->dirty = 0;
    mem_free(text);
    API_LEAVE();
}

/* A judgement as the annotator sent it, from its line in the file; null and an error if the line is
 * not there as it was. */
static json_t *label_said(label *l, const label_who *who, const label_vote *v) {
    const label_item *item = l->item + v->item;
    char *line = malloc(v->size), token[17];
    ssize_t got = line ? pread(l->fd, line, v->size, v->at) : -1;
    int is_whole = got == (ssize_t)v->size;
    json_t *record = is_whole ? json_loadb(line, v->size, JSON_ALLOW_NUL, NULL) : NULL;
    free(line);
    const char *by = json_string_value(json_object_get(record, "annotator")), *name;
    if (!by || strcmp(by, who->name)) {
        json_decref(record);
        label_refuse(l, 500, "%s: somebody else has changed it", l->out);
        return NULL;
    }
    int flip = label_flip(l, who, item) ^ label_turned(item, record);
    label_item_token(who, item, token);
    json_t *said = json_pack("{s:s,s:s}", "id", item->id, "token", token), *aspect;
    const char *const same[] = {"strength", "reason", "seconds"};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        json_object_set(said, same[i], json_object_get(record, same[i]));
    int word = label_word(json_object_get(record, "choice"), LABEL_WORDS);
    if (word >= 0)
        json_object_set_new(said, "choice", json_string(label_words[label_turn(word, flip)]));
    if (json_object_get(record, "aspects")) json_object_set_new(said, "aspects", json_object());
    json_object_foreach(json_object_get(record, "aspects"), name, aspect) {
        word = label_word(aspect, LABEL_TIE + 1);
        if (word >= 0)
            json_object_set_new(json_object_get(said, "aspects"), name,
                                json_string(label_words[label_turn(word, flip)]));
    }
    const json_t *unsafe = json_object_get(record, "unsafe");
    if (json_array_size(unsafe) == 2)
        json_object_set_new(said, "unsafe", json_pack("[O,O]", json_array_get(unsafe, (size_t)flip),
                                                      json_array_get(unsafe, (size_t)!flip)));
    if (json_is_false(json_object_get(record, "label")))
        json_object_set_new(said, "skip", json_true());
    else if (l->write) json_object_set(said, "text", json_object_get(record, "completion"));
    json_decref(record);
    return said;
}

/* Takes back annotator w's last judgement, of this run or an earlier one: its line goes, its item
 * is shown again. *said becomes what was sent. */
static int label_undo(label *l, int w, json_t **said) {
    label_who *who = l->who + w;
    const label_vote *last = who->n_votes ? who->vote + who->n_votes - 1 : NULL;
    if (!last || last->item < 0) return label_refuse(l, 409, "there is nothing to take back");
    off_t at = last->at;
    size_t size = last->size;
    int item = last->item;
    if (!(*said = label_said(l, who, last))) return 500;
    if (label_cut(l, at, size)) {
        json_decref(*said);
        return label_refuse(l, 500, "%s", rlhf_error(l->ctx));
    }
    label_drop_vote(l, who);
    for (int k = 0; k < l->n_whos; k++)
        for (int v = 0; v < l->who[k].n_votes; v++)
            if (l->who[k].vote[v].at > at) l->who[k].vote[v].at -= (off_t)size;
    label_show_next(l, who, item, base_now());
    return 200;
}

/* ---- judging ---- */

/* The item that a message is about, if it was handed out to annotator w and is not judged yet;
 * *status is set otherwise. */
static int label_claim(label *l, int w, const json_t *said, int *status) {
    label_who *who = l->who + w;
    const char *id = json_string_value(json_object_get(said, "id"));
    const char *token = json_string_value(json_object_get(said, "token"));
    const json_t *known = id ? json_object_get(l->ids, id) : NULL;
    int i = (int)json_integer_value(known);
    char right[17] = "";
    *status = 0;
    if (!id || !token)
        *status = label_refuse(l, 400, "\"id\" and \"token\" of the item are missing");
    else if (!known) *status = label_refuse(l, 409, "there is no such item");
    else {
        label_item_token(who, l->item + i, right);
        if (strcmp(token, right) || label_seen(who, i) || !label_may(who, l->item + i))
            *status = label_refuse(l, 409, "this item is no longer yours to judge");
    }
    return i;
}

/* The members that every record has. */
static void label_sign(label *l, int w, int i, const json_t *said, json_t *record) {
    const label_item *item = l->item + i;
    label_who *who = l->who + w;
    char now[32];
    time_t t = time(NULL);
    struct tm tm;
    strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &tm));
    json_object_set_new(record, "annotator", json_string(who->name));
    if (who->kind) json_object_set_new(record, "annotator_type", json_string(who->kind));
    if (item->domain) json_object_set(record, "domain", item->domain);
    if (json_object_get(said, "seconds"))
        json_object_set(record, "seconds", json_object_get(said, "seconds"));
    json_object_set_new(record, "time", json_string(now));
    if (item->item) json_object_set(record, "item", item->item);
    else json_object_set_new(record, "item", json_string(item->id));
    if (item->round) json_object_set_new(record, "round", json_integer(item->round));
    if (item->sources) json_object_set(record, "sources", item->sources);
    if (item->gold >= 0) json_object_set_new(record, "gold", json_string(label_words[item->gold]));
    if (!label_qualified(l, who, item)) json_object_set_new(record, "qualified", json_false());
}

static int label_check_seconds(label *l, const json_t *said) {
    const json_t *v = json_object_get(said, "seconds");
    if (v && !(json_is_number(v) && json_number_value(v) >= 0 && json_number_value(v) < 1e7))
        return label_refuse(l, 400, "\"seconds\" is not a number of seconds");
    return 0;
}

/* Checks what is optional in a judgement and writes it into the record. */
static int label_read_rest(label *l, const json_t *said, int flip, int word, json_t *record) {
    const char *name;
    json_t *v, *strength = json_object_get(said, "strength"), *list;
    size_t i;
    if (strength && !json_is_null(strength)) {
        int n = (int)json_integer_value(strength);
        if (!json_is_integer(strength) || n < 1 || n > 3 || word >= LABEL_TIE)
            return label_refuse(l, 400, "\"strength\" is 1, 2 or 3, of a choice of A or B");
        json_object_set(record, "strength", strength);
    }
    json_t *aspects = json_object_get(said, "aspects");
    if (aspects && !json_is_object(aspects))
        return label_refuse(l, 400, "\"aspects\" is no object");
    if (json_object_size(aspects)) json_object_set_new(record, "aspects", json_object());
    json_object_foreach(aspects, name, v) {
        int asked = 0, which = label_word(v, LABEL_TIE + 1);
        json_array_foreach(l->aspects, i, list) asked |= !strcmp(name, json_string_value(list));
        if (!asked) return label_refuse(l, 400, "the aspect \"%.40s\" is not asked for", name);
        if (which < 0) return label_refuse(l, 400, "an aspect is \"A\", \"B\" or \"tie\"");
        json_object_set_new(json_object_get(record, "aspects"), name,
                            json_string(label_words[label_turn(which, flip)]));
    }
    v = json_object_get(said, "reason");
    if (v && !json_is_string(v)) return label_refuse(l, 400, "\"reason\" is no text");
    if (json_string_length(v) > LABEL_REASON)
        return label_refuse(l, 400, "the reason is too long: at most %d bytes", LABEL_REASON);
    if (json_string_length(v)) json_object_set(record, "reason", v);
    list = json_object_get(said, "unsafe");
    if (!list || json_is_null(list)) return 0;
    if (json_array_size(list) != 2 || !json_is_boolean(json_array_get(list, 0)) ||
        !json_is_boolean(json_array_get(list, 1)))
        return label_refuse(l, 400, "\"unsafe\" is true or false for each of the two answers");
    json_object_set_new(record, "unsafe",
                        json_pack("[O,O]", json_array_get(list, (size_t)flip),
                                  json_array_get(list, (size_t)!flip)));
    return 0;
}

/* Takes a judgement of annotator w: {"id", "token", "choice", ...} as it was shown. Returns a
 * status of HTTP; it is saved after the next label_sync. */
static int label_judge(label *l, int w, const json_t *said) {
    int status, i = label_claim(l, w, said, &status);
    if (l->write) return label_refuse(l, 404, "texts are asked for here, not choices");
    if (status) return status;
    const label_item *item = l->item + i;
    int word = label_word(json_object_get(said, "choice"), LABEL_WORDS);
    int flip = label_flip(l, l->who + w, item), choice = label_turn(word, flip);
    if (word < 0)
        return label_refuse(l, 400,
                            "\"choice\" is \"A\", \"B\", \"tie\", \"both_bad\" or \"skip\"");
    if ((status = label_check_seconds(l, said))) return status;
    json_t *record = json_pack("{s:O,s:O,s:s}", "prompt", item->prompt, "answers", item->answers,
                               "choice", label_words[choice]);
    if ((status = label_read_rest(l, said, flip, word, record))) {
        json_decref(record);
        return status;
    }
    json_object_set_new(record, "order", json_pack("[i,i]", flip, !flip));
    label_sign(l, w, i, said, record);
    label_vote v = {.right = item->gold >= 0 && word != LABEL_SKIP ? choice == item->gold : -1,
                    .seconds = json_number_value(json_object_get(said, "seconds"))};
    v.counts = word != LABEL_SKIP && item->gold < 0 && label_qualified(l, l->who + w, item);
    return label_commit(l, w, i, record, v);
}

/* The same for a text: {"id", "token", "text"} or with "skip" true. What is skipped is kept as a
 * record that no trainer learns. */
static int label_write(label *l, int w, const json_t *said) {
    int status, i = label_claim(l, w, said, &status), skip;
    if (!l->write) return label_refuse(l, 404, "choices are asked for here, not texts");
    if (status) return status;
    const label_item *item = l->item + i;
    const json_t *text = json_object_get(said, "text");
    skip = json_is_true(json_object_get(said, "skip"));
    if (!skip && !json_string_length(text)) return label_refuse(l, 400, "\"text\" is missing");
    if (json_string_length(text) > LABEL_TEXT)
        return label_refuse(l, 400, "the text is too long: at most %d bytes", LABEL_TEXT);
    if ((status = label_check_seconds(l, said))) return status;
    json_t *record = json_pack("{s:O,s:s}", "prompt", item->prompt, "completion",
                               skip ? "" : json_string_value(text));
    if (skip) json_object_set_new(record, "label", json_false());
    if (item->draft) json_object_set(record, "draft", item->draft);
    label_sign(l, w, i, said, record);
    label_vote v = {.right = -1, .counts = !skip,
                    .seconds = json_number_value(json_object_get(said, "seconds"))};
    return label_commit(l, w, i, record, v);
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 38 POOL (label_)
 * Where items and annotators come from: files of records, people.json, what models sample, and what
 * the file of judgements says of earlier runs. Sampling goes in windows of a few prompts, whose
 * items are kept in OUT.items before anybody sees them: a restart samples nothing twice.
 * Entry: label_open, label_sample, label_free.
 * Tests: test/test_label.c
 * ============================================================================================ */

/* ---- reading what there is ---- */

static json_t *label_turns(const chat_message *m, int n) {
    json_t *list = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(
            list, json_pack("{s:s,s:s}", "role", m[i].role, "content", m[i].content));
    return list;
}

/* The prompt as a judgement's record says it: a text, to which answers are joined as they are, or
 * turns, which go into c. */
static json_t *label_read_prompt(const data_reader *r, const data_form *f, data_chat *c) {
    int talk = f->question || f->system || f->whole.v;
    for (int i = 0; i < f->n; i++) talk |= !json_is_string(f->answer[i].v);
    if (json_is_string(f->prompt.v) && !talk) return json_incref(f->prompt.v);
    if (f->shared) return json_stringn(json_string_value(f->answer[0].v), f->shared);
    data_prompt_chat(r, f, c);
    return label_turns(c->message, c->n);
}

/* Answer i, without the prompt that it may begin with: a text if that is all there is. */
static json_t *label_read_answer(const data_reader *r, const data_form *f, int i, int n_prompt) {
    const json_t *v = f->answer[i].v;
    if (json_is_string(v)) return json_string(json_string_value(v) + f->shared);
    data_chat c = {0};
    data_chat_read(r, &c, f->answer[i]);
    int from = f->prompt.v || f->question ? 0 : n_prompt;
    if (from >= c.n) data_bad(r, "an answer has no turn of its own");
    json_t *answer = c.n - from == 1 && data_is_answer(c.message + from)
                         ? json_string(c.message[from].content)
                         : label_turns(c.message + from, c.n - from);
    mem_free(c.message);
    return answer;
}

/* Adds an item, unless the same is there; takes the reference of answers. The other values are
 * shared. Returns its number, -1 if it is no new one. */
static int label_add_item(label *l, const json_t *record, json_t *prompt, json_t *answers) {
    label_item item = {.prompt = json_incref(prompt), .answers = answers, .gold = -1};
    item.doubt = INFINITY;
    item.item = json_incref(json_get(record, "item"));
    item.domain = json_is_string(json_get(record, "domain")) ? json_get(record, "domain") : NULL;
    json_incref(item.domain);
    item.sources = json_incref(json_get(record, "sources"));
    item.draft = json_is_string(json_get(record, "draft")) ? json_get(record, "draft") : NULL;
    json_incref(item.draft);
    item.round = (int)json_integer_value(json_get(record, "round"));
    label_id(item.item, prompt, answers, item.id);
    for (int w = 0; w < l->n_whos; w++)
        item.crowd += l->who[w].invited && label_may(l->who + w, &item);
    if (json_object_get(l->ids, item.id)) {
        json_t *const gone[] = {item.prompt, item.answers, item.item,
                                item.domain, item.sources, item.draft};
        for (size_t k = 0; k < sizeof gone / sizeof *gone; k++) json_decref(gone[k]);
        return -1;
    }
    int cap = l->cap_items;
    l->item = label_grow(l->item, l->n_items, &l->cap_items, sizeof *l->item);
    l->order = label_grow(l->order, l->n_items, &cap, sizeof *l->order);
    json_object_set_new(l->ids, item.id, json_integer(l->n_items));
    l->order[l->n_items] = l->n_items;
    l->item[l->n_items] = item;
    return l->n_items++;
}

/* The right one of a gold record's answers: by its "gold", its choice or its ranks. */
static int label_read_gold(const data_reader *r, const json_t *j, const data_form *f) {
    int side = data_side(json_get(j, "gold"));
    if (f->n != 2) data_bad(r, "a gold item has two answers");
    if (side >= 0) return side;
    if (f->rank[0] == f->rank[1])
        data_bad(r, "which answer is right? expected \"chosen\" and \"rejected\", or "
                    "\"answers\" with a \"choice\" or \"gold\" of \"A\" or \"B\"");
    return f->rank[0] > f->rank[1];
}

/* Reads a record with a prompt and, unless texts are to be written, answers: all their pairs. */
static void label_read_item(rater_set *set, const json_src *src, json_t *record) {
    const label_source *s = (const label_source *)(void *)set;
    label *l = s->l;
    json_t *j = (json_t *)(uintptr_t)record;
    rlhf_dataset d = {.ctx = l->ctx,
                      .config = {.kind = l->write ? RLHF_DATA_PROMPT : RLHF_DATA_PREFERENCE}};
    data_reader r = {.d = &d, .chat = "auto", .src = *src};
    data_form f;
    data_chat c = {0};
    if (!json_is_object(j)) data_bad(&r, "expected an object");
    json_opt_str(src, j, "domain", NULL);
    data_read_form(&r, j, &f);
    json_t *prompt = json_hold(l->ctx, label_read_prompt(&r, &f, &c));
    if (l->write) label_add_item(l, j, prompt, NULL);
    else if (f.n < 2) data_bad(&r, "expected two answers or more");
    int gold = s->gold ? label_read_gold(&r, j, &f) : -1;
    for (int a = 0; a < f.n && !l->write; a++)
        for (int b = a + 1; b < f.n; b++) {
            json_t *one = label_read_answer(&r, &f, a, c.n);
            json_t *two = label_read_answer(&r, &f, b, c.n);
            if (json_equal(one, two)) {
                log_at(l->ctx, RLHF_LOG_INFO, "%s:%lld: equal answers are not compared", src->file,
                       (long long)src->line);
                json_decref(one), json_decref(two);
                continue;
            }
            int i = label_add_item(l, j, prompt, json_pack("[o,o]", one, two));
            if (i >= 0) l->item[i].gold = gold;
            l->n_gold += i >= 0 && gold >= 0;
        }
    /* What a sampled item was made for is done. */
    if (s->sampled && json_get(j, "round")) {
        label_sampler *m = l->sampler;
        char *text = json_dumps(prompt, JSON_COMPACT | JSON_SORT_KEYS | JSON_ENCODE_ANY), *key;
        int round = (int)json_integer_value(json_get(j, "round"));
        key = mem_printf(l->ctx, "%d %s", round, text);
        if (m) json_object_set_new(m->done, key, json_true());
        if (m) m->round = base_max(m->round, round);
        for (size_t k = 0; m && k < json_array_size(json_get(j, "sources")); k++) {
            const json_t *from = json_array_get(json_get(j, "sources"), k);
            const char *hash = json_string_value(json_object_get(from, "weights_hash"));
            if (hash) {
                mem_free(key);
                key = mem_printf(l->ctx, "%d %s", round, hash);
                json_object_set_new(m->done, key, json_true());
            }
        }
        mem_free(key);
        free(text);
    }
    err_release(l->ctx);
    mem_free(c.message);
    mem_free(f.question);
}

/* Reads a judgement of an earlier run. */
static void label_read_vote(rater_set *set, const json_src *src, json_t *j) {
    label_source *s = (label_source *)(void *)set;
    label *l = s->l;
    if (!src->line)
        err_throw(l->ctx, RLHF_ERR_DATA, "%s: a JSON array; judgements are added to JSON lines",
                  l->out);
    for (; s->line < src->line; s->line++) s->at = strchr(s->text + s->at, '\n') - s->text + 1;
    if (!json_is_object(j)) json_bad(src, "record", j, "an object");
    /* Records of others may stand in the same file. */
    const char *name = json_opt_str(src, j, "annotator", NULL);
    if (!name) return;
    label_who *who = label_who_of(l, name);
    const json_t *own = json_get(j, "item"), *answers = json_get(j, "answers");
    char id[17];
    label_id(own, json_get(j, "prompt"), answers, id);
    const json_t *known = json_object_get(l->ids, id);
    if (!known && json_is_string(own)) known = json_object_get(l->ids, json_string_value(own));
    label_vote v = {.item = known ? (int)json_integer_value(known) : -1, .right = -1, .at = s->at};
    v.size = strcspn(s->text + s->at, "\n") + 1;
    v.seconds = json_opt_real(src, j, "seconds", 0);
    int skip = json_is_false(json_get(j, "label")), choice = DATA_TIE;
    if (!l->write && json_get(j, "choice")) choice = data_choice(src, j);
    skip |= choice == DATA_SKIP;
    int gold = known ? l->item[v.item].gold : -1;
    if (known) choice = label_turn(choice, label_turned(l->item + v.item, j));
    if (gold >= 0 && !skip) v.right = choice == gold;
    v.counts = !skip && gold < 0 && !json_is_false(json_get(j, "qualified"));
    label_add_vote(l, who, v);
}

/* Opens a file of lines for appending, locked against a second program, and reads it. What stands
 * behind its last line end is half a line, unless it is JSON: then only the end was missing. */
static int label_open_lines(label *l, const char *path, char **text, size_t *len) {
    rlhf_ctx *ctx = l->ctx;
    int fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) io_fail(ctx, "write", path, errno);
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        close(fd);
        err_throw(ctx, RLHF_ERR_IO, "%s: another program is writing it", path);
    }
    *text = mem_temp(io_read(ctx, path, IO_LIMIT, len));
    size_t whole = *len;
    if (lseek(fd, 0, SEEK_END) != (off_t)whole) {
        close(fd);
        err_throw(ctx, RLHF_ERR_DATA, "%s: compressed; lines are added to plain text", path);
    }
    while (whole && (*text)[whole - 1] != '\n') whole--;
    int bad = 0;
    if (whole < *len) {
        json_t *last = json_loadb(*text + whole, *len - whole, 0, NULL);
        if (json_is_object(last)) bad = write(fd, "\n", 1) != 1;
        else {
            log_at(ctx, RLHF_LOG_WARNING, "%s: %zu bytes of an unfinished line are cut off", path,
                   *len - whole);
            bad = ftruncate(fd, (off_t)whole) != 0;
            *len = whole;
        }
        json_decref(last);
    }
    if (bad || fsync(fd)) {
        close(fd);
        io_fail(ctx, "write", path, errno);
    }
    io_sync_parent(ctx, path);
    return fd;
}

/* Reads the file, which is made if it is not there. */
static void label_open_out(label *l) {
    label_source s = {.set = {.ctx = l->ctx}, .l = l};
    char *text;
    size_t len;
    l->fd = label_open_lines(l, l->out, &text, &len);
    l->size = lseek(l->fd, 0, SEEK_END);
    s.text = text, s.line = 1;
    rater_each(&s.set, l->out, text, len, label_read_vote);
}

/* ---- annotators ---- */

/* 128 random bits as text. */
static void label_new_token(rlhf_ctx *ctx, char token[LABEL_LONGEST + 1]) {
    unsigned char bits[LABEL_TOKEN / 2];
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    int bad = fd < 0 || read(fd, bits, sizeof bits) != (ssize_t)sizeof bits;
    if (fd >= 0) close(fd);
    if (bad) io_fail(ctx, "read", "/dev/urandom", errno);
    for (size_t i = 0; i < sizeof bits; i++) snprintf(token + 2 * i, 3, "%02x", bits[i]);
}

/* The member under either of two names. */
static const char *label_either(const json_src *src, const json_t *j, const char *a,
                                const char *b) {
    return json_get(j, a) ? json_need_str(src, j, a) : json_opt_str(src, j, b, NULL);
}

/* Reads people.json: a list of {"name", "kind", "domains", "token"}; or "annotator" and
 * "annotator_type", as records say it. */
static void label_read_people(label *l, const char *path) {
    json_src src = json_source(l->ctx, path);
    json_t *list = json_read(&src), *j, *v;
    size_t i, k;
    char at[64];
    if (!json_is_array(list) || !json_array_size(list))
        json_bad(&src, "annotators", list, "a list of {\"name\": ...}");
    json_array_foreach(list, i, j) {
        snprintf(at, sizeof at, "[%zu].", i);
        src.at = at;
        const char *name = label_either(&src, j, "name", "annotator");
        if (!name || !*name) json_need_str(&src, j, "name");
        if (json_object_get(l->names, name) || !strcmp(name, "operator"))
            json_bad(&src, "name", json_object_get(j, "name"), "a name that no other has");
        label_who *who = label_who_of(l, name);
        const char *kind = label_either(&src, j, "kind", "annotator_type");
        const char *token = json_opt_str(&src, j, "token", "");
        who->invited = 1;
        if (kind) who->kind = strdup(kind);
        who->domains = json_incref(json_opt_array(&src, j, "domains"));
        json_array_foreach(who->domains, k, v) if (!json_is_string(v))
            json_bad(&src, "domains", v, "texts");
        if (who->domains && !json_array_size(who->domains))
            json_bad(&src, "domains", who->domains,
                     "at least one; without this key all domains are the annotator's");
        size_t n = strlen(token), plain = strspn(token, "abcdefghijklmnopqrstuvwxyz"
                                                        "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_");
        if (n && (n < LABEL_SHORTEST || n > LABEL_LONGEST || plain != n))
            json_bad(&src, "token", json_object_get(j, "token"),
                     "16 to 64 letters, digits, '-' or '_'");
        memcpy(who->token, token, n + 1);
    }
    err_release(l->ctx);
}

/* Gives everybody without a token the one of an earlier run, or a new one, and keeps them in
 * OUT.tokens, which is for the owner's eyes only. */
static void label_keep_tokens(label *l) {
    rlhf_ctx *ctx = l->ctx;
    char *path = mem_temp(mem_printf(ctx, "%s.tokens", l->out));
    json_src src = json_source(ctx, path);
    json_t *kept = io_exists(path) ? json_read(&src) : json_hold(ctx, json_object());
    for (int w = -1; w < l->n_whos; w++) {
        if (w >= 0 && !l->who[w].invited) continue;
        const char *name = w < 0 ? "operator" : l->who[w].name;
        char *token = w < 0 ? l->operator_token : l->who[w].token;
        const char *old = json_opt_str(&src, kept, name, "");
        if (!*token && *old && strlen(old) <= LABEL_LONGEST) memcpy(token, old, strlen(old) + 1);
        if (!*token) label_new_token(ctx, token);
        for (int k = -1; k < w; k++)
            if (!strcmp(token, k < 0 ? l->operator_token : l->who[k].token))
                err_throw(ctx, RLHF_ERR_ARG, "the token of \"%s\" is another's, too", name);
        json_object_set_new(kept, name, json_string(token));
    }
    mode_t before = umask(077);
    json_write_file(ctx, path, kept);
    umask(before);
    err_release(ctx);
}

/* ---- sampling ---- */

/* For qsort_r's lack: items by doubt, then as they came. */
typedef struct label_rank {
    double doubt;
    int item;
} label_rank;

static int label_compare(const void *a, const void *b) {
    const label_rank *x = a, *y = b;
    return x->doubt != y->doubt ? (x->doubt < y->doubt ? -1 : 1)
                                : (x->item > y->item) - (x->item < y->item);
}

/* The most uncertain items come first. */
static void label_sort(label *l) {
    label_rank *rank = mem_alloc(l->ctx, (size_t)(l->n_items + 1) * sizeof *rank);
    for (int i = 0; i < l->n_items; i++) rank[i] = (label_rank){l->item[i].doubt, i};
    qsort(rank, (size_t)l->n_items, sizeof *rank, label_compare);
    for (int i = 0; i < l->n_items; i++) l->order[i] = rank[i].item;
    mem_free(rank);
}

/* Measures the doubt of the items from number `from` on by a reward model; those it cannot read
 * keep theirs. */
static void label_doubt(label *l, int from, rlhf_model *m, rlhf_tokenizer *tok, const char *chat) {
    rlhf_ctx *ctx = l->ctx;
    tok_buf b = {.ctx = ctx};
    tok_put(&b, "", 0);
    for (int i = from; i < l->n_items; i++) {
        json_t *j = json_hold(ctx, json_pack("{s:O,s:O,s:O,s:i}", "prompt", l->item[i].prompt,
                                             "chosen", json_array_get(l->item[i].answers, 0),
                                             "rejected", json_array_get(l->item[i].answers, 1),
                                             "number", i));
        size_t n;
        char *line = json_text(ctx, j, JSON_COMPACT, &n);
        tok_put(&b, line, n);
        tok_put(&b, "\n", 1);
        mem_free(line);
        err_release(ctx);
    }
    rlhf_data_config config = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    config.max_length = m->c.positions;
    config.chat_template = chat;
    rlhf_dataset *d = data_parse(ctx, b.p, b.n, "items", tok, &config);
    arena_reset(&m->ws);
    float *score = rm_score_pairs(m, &m->ws, d);
    for (int i = 0; i < d->n; i++) {
        json_t *j = json_loads(d->record[i].line, JSON_ALLOW_NUL, NULL);
        l->item[json_integer_value(json_object_get(j, "number"))].doubt =
            fabs((double)score[2 * i] - (double)score[2 * i + 1]);
        json_decref(j);
    }
    data_free(d);
    mem_free(b.p);
}

/* The same as a call of its own: items that are all too long for the model are no reason to end. */
static rlhf_status label_rank_items(label *l, int from, rlhf_model *m, rlhf_tokenizer *tok,
                                    const char *chat) {
    API_ENTER(l->ctx);
    if (m && from < l->n_items && !l->write) {
        model_need_score(m);
        label_doubt(l, from, m, tok, chat);
    }
    label_sort(l);
    API_LEAVE();
}

/* What is said of each sampled answer. */
static json_t *label_source_of(const label_sampler *m, int which, const rlhf_generate_config *g,
                               const rlhf_sample *s) {
    return json_pack("{s:s,s:s,s:f,s:I,s:f,s:I,s:I,s:i,s:i,s:b,s:f}", "model", m->dir[which],
                     "weights_hash", m->hash[which], "temperature", g->temperature, "top_k",
                     (json_int_t)g->top_k, "top_p", g->top_p, "max_new_tokens",
                     (json_int_t)g->max_new_tokens, "seed", (json_int_t)g->seed, "prompt",
                     s->prompt_index, "sample", s->sample_index, "finished", s->finished, "logprob",
                     s->logprob);
}

/* One sampled prompt as records of items, appended to b: all pairs of its answers, or the draft. */
static void label_sampled(label *l, const json_t *record, const json_t *prompt, json_t *answers,
                          json_t *sources, tok_buf *b) {
    size_t n = json_array_size(answers);
    for (size_t i = 0; i < n; i++)
        for (size_t k = l->write ? 0 : i + 1; k < (l->write ? 1 : n); k++) {
            json_t *j = json_hold(l->ctx, json_pack("{s:O}", "prompt", prompt));
            const char *const keep[] = {"domain", "item"};
            for (size_t m = 0; m < 2; m++)
                json_object_set(j, keep[m], json_get(record, keep[m]));
            if (l->write) json_object_set(j, "draft", json_array_get(answers, i));
            else
                json_object_set_new(j, "answers", json_pack("[O,O]", json_array_get(answers, i),
                                                            json_array_get(answers, k)));
            json_object_set_new(j, "sources",
                                l->write ? json_pack("[O]", json_array_get(sources, i))
                                         : json_pack("[O,O]", json_array_get(sources, i),
                                                     json_array_get(sources, k)));
            json_object_set_new(j, "round", json_integer(l->sampler->round));
            size_t len;
            char *line = json_text(l->ctx, j, JSON_COMPACT, &len);
            tok_put(b, line, len);
            tok_put(b, "\n", 1);
            mem_free(line);
            err_release(l->ctx);
        }
}

/* The prompt of a record that is sampled for, as items say it. A held value. */
static json_t *label_prompt_of(label *l, const char *line) {
    json_src src = json_source(l->ctx, l->c->prompts);
    src.status = RLHF_ERR_DATA;
    json_t *j = json_parse(&src, line, strlen(line));
    rlhf_dataset d = {.ctx = l->ctx, .config = {.kind = RLHF_DATA_PROMPT}};
    data_reader r = {.d = &d, .chat = "auto", .src = src};
    data_form f;
    data_chat c = {0};
    data_read_form(&r, j, &f);
    json_t *prompt = label_read_prompt(&r, &f, &c);
    mem_free(c.message);
    mem_free(f.question);
    err_release(l->ctx);
    return json_hold(l->ctx, prompt);
}

/* Whether the prompt was sampled for in this round. */
static int label_is_sampled(label *l, const char *line) {
    json_t *prompt = label_prompt_of(l, line);
    size_t n;
    char *text = json_text(l->ctx, prompt, JSON_COMPACT | JSON_SORT_KEYS, &n);
    char *key = mem_printf(l->ctx, "%d %s", l->sampler->round, text);
    int is = json_object_get(l->sampler->done, key) != NULL;
    mem_free(key);
    mem_free(text);
    err_release(l->ctx);
    return is;
}

/* Keeps the samples of a window of prompts in OUT.items and makes items of them. */
static rlhf_status label_keep_samples(label *l, int from, int n, int each[2],
                                      rlhf_sample *const sample[2],
                                      const rlhf_generate_config g[2]) {
    label_sampler *m = l->sampler;
    API_ENTER(l->ctx);
    tok_buf b = {.ctx = l->ctx};
    tok_put(&b, "", 0);
    for (int i = 0; i < n; i++) {
        const char *line = m->prompts->record[from + i].line;
        if (label_is_sampled(l, line)) continue;
        json_t *answers = json_hold(l->ctx, json_array());
        json_t *sources = json_hold(l->ctx, json_array());
        for (int which = 0; which < 2; which++)
            for (int k = 0; k < each[which]; k++) {
                const rlhf_sample *s = sample[which] + i * each[which] + k;
                json_array_append_new(answers, json_string(s->completion));
                json_array_append_new(sources, label_source_of(m, which, g + which, s));
            }
        json_t *prompt = label_prompt_of(l, line);
        json_t *record = json_hold(l->ctx, json_loads(line, JSON_ALLOW_NUL, NULL));
        label_sampled(l, record, prompt, answers, sources, &b);
        for (int k = 0; k < 4; k++) err_release(l->ctx);
    }
    for (size_t done = 0; done < b.n;) {
        ssize_t got = write(m->fd, b.p + done, b.n - done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) io_fail(l->ctx, "write", l->out, errno);
        done += (size_t)got;
    }
    if (fsync(m->fd)) io_fail(l->ctx, "write", l->out, errno);
    label_source s = {.set = {.ctx = l->ctx}, .l = l, .sampled = 1};
    rater_each(&s.set, "sampled items", b.p, b.n, label_read_item);
    mem_free(b.p);
    API_LEAVE();
}

/* Samples for the next few prompts, which takes a moment: the progress hook is called meanwhile.
 * RLHF_STOPPED leaves them for the next call. */
static rlhf_status label_sample(label *l) {
    label_sampler *m = l->sampler;
    int total = l->write ? 1 : (int)l->c->num_answers, n = 0, from = m->next;
    int each[2] = {m->model[1] ? total - total / 2 : total, m->model[1] ? total / 2 : 0};
    int most = base_max(1, (int)l->c->batch_size / total), items = l->n_items;
    rlhf_sample *sample[2] = {NULL, NULL};
    rlhf_generate_config g[2];
    while (n < most && from + n < m->prompts->n) n++;
    rlhf_dataset view = *m->prompts;
    view.record += from;
    view.n = n;
    rlhf_status status = RLHF_OK;
    int counts[2] = {0, 0};
    for (int which = 0; which < 2 && !status; which++) {
        if (!each[which]) continue;
        g[which] = rlhf_generate_config_default();
        g[which].max_new_tokens = l->c->max_new_tokens;
        g[which].temperature = l->c->temperature;
        g[which].top_k = l->c->top_k;
        g[which].top_p = l->c->top_p;
        g[which].batch_size = l->c->batch_size;
        g[which].num_return_sequences = each[which];
        /* Below 2^53: the seed is written as a number of JSON. */
        g[which].seed = (int64_t)(rng_u64((uint64_t)l->c->seed, RNG_LABEL,
                                          (uint64_t)m->round << 32 | (uint64_t)from) >> 12);
        g[which].seed += which;
        status = rlhf_generate_dataset(m->model[which], m->tok, g + which, &view, sample + which,
                                       counts + which);
    }
    if (!status) status = label_keep_samples(l, from, n, each, sample, g);
    for (int which = 0; which < 2; which++) rlhf_samples_free(l->ctx, sample[which], counts[which]);
    if (!status) m->next += n;
    if (!status) status = label_rank_items(l, items, m->reward, m->reward_tok, m->chat_template);
    return status;
}

/* ---- beginning and end ---- */

static void label_read_options(label *l) {
    const label_config *c = l->c;
    rlhf_ctx *ctx = l->ctx;
    l->write = !strcmp(c->task, "write");
    l->aspects = json_array();
    for (const char *p = c->aspects; *p;) {
        size_t n = strcspn(p, ",");
        if (!n || n > LABEL_NAMES)
            err_throw(ctx, RLHF_ERR_ARG, "--aspects: \"%s\", expected names separated by commas",
                      c->aspects);
        const json_t *one;
        size_t i;
        json_array_foreach(l->aspects, i, one)
            if (json_string_length(one) == n && !memcmp(json_string_value(one), p, n))
                err_throw(ctx, RLHF_ERR_ARG, "--aspects: \"%.*s\" is there twice", (int)n, p);
        json_array_append_new(l->aspects, json_stringn(p, n));
        p += n + (p[n] == ',');
    }
    char end;
    if (*c->qualify && (sscanf(c->qualify, "%d:%lf%c", &l->qualify, &l->share, &end) != 2 ||
                        l->qualify < 1 || !(l->share >= 0 && l->share <= 1)))
        err_throw(ctx, RLHF_ERR_ARG,
                  "--qualify: \"%s\", expected N:SHARE as in 5:0.8, five gold items of which 80 %% "
                  "are right",
                  c->qualify);
    if (l->qualify && !*c->gold) err_throw(ctx, RLHF_ERR_ARG, "--qualify needs --gold FILE");
    if (l->write && (*c->gold || *c->aspects || *c->pairs))
        err_throw(ctx, RLHF_ERR_ARG,
                  "--task write takes --prompts, no pairs, gold items or aspects");
    size_t n;
    if (*c->guidelines) {
        char *text = io_read(ctx, c->guidelines, 1 << 20, &n);
        l->guidelines = strdup(text);
        mem_free(text);
    }
}

/* Who is asked to judge must be able to qualify. */
static void label_check_gold(label *l) {
    for (int i = 0; i < l->n_items && l->qualify; i++) {
        int n = 0;
        const label_item *item = l->item + i;
        for (int k = 0; k < l->n_items; k++)
            n += l->item[k].gold >= 0 && !strcmp(label_domain(l->item + k), label_domain(item));
        if (item->gold < 0 && n < l->qualify)
            err_throw(l->ctx, RLHF_ERR_DATA,
                      "%s: %d gold items of the domain \"%s\", --qualify %s asks for %d",
                      l->c->gold, n, label_domain(item), l->c->qualify, l->qualify);
    }
    int regular = l->n_items - l->n_gold;
    l->gold_every = (int)l->c->gold_every;
    if (l->n_gold && regular && !l->sampler)
        l->gold_every = base_min(l->gold_every, base_max(2, l->n_items / l->n_gold));
}

/* Reads everything that the options name, then the file. l->ctx, c and out are set, and sampler,
 * if a model answers. */
static rlhf_status label_open(label *l) {
    API_ENTER(l->ctx);
    label_source s = {.set = {.ctx = l->ctx}, .l = l};
    l->fd = -1;
    l->ids = json_object();
    l->names = json_object();
    label_read_options(l);
    if (*l->c->annotators) label_read_people(l, l->c->annotators);
    else label_who_of(l, l->c->annotator)->invited = 1;
    label_keep_tokens(l);
    /* Gold items first: a pair that is the same is one of them. */
    s.gold = 1;
    if (*l->c->gold) rater_each_in(&s.set, l->c->gold, label_read_item);
    s.gold = 0;
    if (*l->c->pairs) rater_each_in(&s.set, l->c->pairs, label_read_item);
    if (l->write && !l->sampler) rater_each_in(&s.set, l->c->prompts, label_read_item);
    char *path = mem_temp(mem_printf(l->ctx, "%s.items", l->out)), *text;
    size_t len;
    s.sampled = 1;
    if (l->sampler || io_exists(path)) {
        int fd = label_open_lines(l, path, &text, &len);
        rater_each(&s.set, path, text, len, label_read_item);
        if (l->sampler) l->sampler->fd = fd;
        else close(fd);
    }
    label_check_gold(l);
    label_open_out(l);
    API_LEAVE();
}

static void label_free(label *l) {
    for (int i = 0; i < l->n_items; i++) {
        const label_item *item = l->item + i;
        json_decref(item->prompt), json_decref(item->answers), json_decref(item->item);
        json_decref(item->domain), json_decref(item->sources), json_decref(item->draft);
    }
    for (int w = 0; w < l->n_whos; w++) {
        label_who *who = l->who + w;
        free(who->name), free(who->kind), free(who->seen), free(who->vote), free(who->vet);
        json_decref(who->domains);
    }
    json_decref(l->ids), json_decref(l->names), json_decref(l->aspects);
    free(l->item), free(l->order), free(l->who), free(l->guidelines);
    if (l->fd >= 0) close(l->fd);
    if (l->sampler && l->sampler->fd >= 0) close(l->sampler->fd);
    if (l->sampler) json_decref(l->sampler->done);
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 39 SERVE (serve_)
 * How people are asked: a page in their browser, served by libmicrohttpd to whoever has a link, or
 * this terminal. One thread does everything, so there are no locks; judgements that arrive together
 * share one fsync, and each is answered after it.
 *
 * Not let in: requests without a token, which is compared in constant time and travels neither in
 * an address nor in a cookie; other names in the Host header, by which a foreign page could reach
 * a local one; bodies over 1 MiB, more than a person's requests, connections that stand still.
 * Texts of models and people are JSON to the page, which shows them as text; its policy lets no
 * other script or resource in.
 *
 * Entry: serve_open, serve_poll, serve_close; serve_tty.
 * Tests: test/test_label.c, test/label_load.py
 * ============================================================================================ */

#ifndef RLHF_NO_HTTP

#include <arpa/inet.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

enum {
    SERVE_BODY = 1 << 20,
    SERVE_DRAIN = 8 << 20, /* what is larger is read up to here, for the sender to see the error */
    SERVE_CONNECTIONS = 900, /* below the usual 1,024 files of a process */
    SERVE_IDLE = 60,         /* seconds that a connection may stand still */
    SERVE_RATE = 20,         /* requests a second by one token, and how many at once */
    SERVE_BURST = 200
};

#define SERVE_POLICY                                                                               \
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "                \
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

/* One request: its body, then its answer. */
typedef struct serve_request {
    char *body;
    size_t n, cap;
    int status; /* 0: not answered yet */
    json_t *reply;
    struct MHD_Connection *connection;
    struct serve_request *next; /* of those that wait for the disk */
} serve_request;

typedef struct serve {
    label *l;
    struct MHD_Daemon *daemon;
    int port, failed;
    char host[80];          /* as it stands in links */
    serve_request *waiting; /* suspended until label_sync */
} serve;

/* ---- answers ---- */

static enum MHD_Result serve_send(struct MHD_Connection *connection, int status,
                                  struct MHD_Response *response, const char *type, int fresh) {
    const char *const headers[][2] = {{"Content-Type", type},
                                      {"Content-Security-Policy", SERVE_POLICY},
                                      {"X-Content-Type-Options", "nosniff"},
                                      {"Referrer-Policy", "no-referrer"},
                                      {"Cross-Origin-Resource-Policy", "same-origin"},
                                      {"Cache-Control", fresh ? "no-store" : "no-cache"}};
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++)
        MHD_add_response_header(response, headers[i][0], headers[i][1]);
    if (status == 429) MHD_add_response_header(response, "Retry-After", "1");
    if (status == 401) MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
    enum MHD_Result result = MHD_queue_response(connection, (unsigned)status, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result serve_send_json(struct MHD_Connection *connection, int status,
                                       const json_t *reply) {
    char *text = json_dumps(reply, JSON_COMPACT | JSON_REAL_PRECISION(9));
    if (!text) return MHD_NO;
    struct MHD_Response *response =
        MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);
    return serve_send(connection, status, response, "application/json; charset=utf-8", 1);
}

static int serve_error(serve_request *r, int status, const char *text) {
    r->reply = json_pack("{s:s}", "error", text);
    return r->status = status;
}

/* What is there without a token. Null: nothing. */
static const char *serve_page(const char *url, const char **type) {
    static const char *const pages[][3] = {{"/", "label.html", "text/html; charset=utf-8"},
                                           {"/label.css", "label.css", "text/css; charset=utf-8"},
                                           {"/label.js", "label.js",
                                            "text/javascript; charset=utf-8"}};
    for (size_t i = 0; i < sizeof pages / sizeof *pages; i++)
        if (!strcmp(url, pages[i][0])) return *type = pages[i][2], pages[i][1];
    return NULL;
}

/* ---- who asks ---- */

/* Whether two tokens are the same; takes as long whatever they hold. */
static int serve_same_token(const char *a, const char *b) {
    char x[LABEL_LONGEST + 1] = {0}, y[LABEL_LONGEST + 1] = {0};
    unsigned char differ = 0;
    size_t na = strnlen(a, sizeof x), nb = strnlen(b, sizeof y);
    memcpy(x, a, na < sizeof x ? na : sizeof x);
    memcpy(y, b, nb < sizeof y ? nb : sizeof y);
    for (size_t i = 0; i < sizeof x; i++) differ |= (unsigned char)(x[i] ^ y[i]);
    return !differ && *a;
}

/* The annotator of a token, -1 for the operator's, -2 for nobody's. All are compared. */
static int serve_who(const label *l, const char *token) {
    int found = serve_same_token(token, l->operator_token) ? -1 : -2;
    for (int w = 0; w < l->n_whos; w++)
        if (serve_same_token(token, l->who[w].token) && l->who[w].invited) found = w;
    return found;
}

/* Whether one more request is within the rate of a token. */
static int serve_allow(label_who *who, double now) {
    if (!who->counted_at) who->allowance = SERVE_BURST;
    else who->allowance = fmin(SERVE_BURST, who->allowance + (now - who->counted_at) * SERVE_RATE);
    who->counted_at = now;
    if (who->allowance < 1) return 0;
    who->allowance--;
    return 1;
}

/* Whether the Host header names this server: a name of this machine's loopback, or --host. A page
 * of another name whose address was changed to ours is thereby not let in. */
static int serve_host_ok(const serve *s, const char *header) {
    static const char *const names[] = {"localhost", "127.0.0.1", "[::1]"};
    char name[256];
    if (!header) return 0;
    snprintf(name, sizeof name, "%s", header);
    char *colon = strrchr(name, ':');
    if (colon && !strchr(colon, ']')) *colon = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcasecmp(name, names[i])) return 1;
    const char *asked = s->l->c->host;
    if (!strcasecmp(name, s->host) || !strcasecmp(name, asked)) return 1;
    /* Listening on every address: any address will do, names but the machine's own will not. */
    unsigned char address[16];
    char own[256] = "";
    int is_any = !strcmp(asked, "0.0.0.0") || !strcmp(asked, "::");
    if (!is_any) return 0;
    gethostname(own, sizeof own - 1);
    return *name == '[' || inet_pton(AF_INET, name, address) == 1 || !strcasecmp(name, own);
}

/* ---- what is asked ---- */

/* The reply's "progress", and "item": null for none. */
static void serve_put(serve *s, serve_request *r, int w, int item) {
    json_object_set_new(r->reply, "item", item < 0 ? json_null() : label_show(s->l, w, item));
    json_object_set_new(r->reply, "progress", label_progress(s->l, w));
}

static int serve_session(serve *s, serve_request *r, int w) {
    const label *l = s->l;
    const label_who *who = w < 0 ? NULL : l->who + w;
    r->reply = json_pack("{s:s,s:s,s:O,s:s}", "role", who ? "annotator" : "operator", "task",
                         l->write ? "write" : "compare", "aspects", l->aspects, "guidelines",
                         l->guidelines ? l->guidelines : "");
    r->status = 200;
    if (!who) return 200;
    json_object_set_new(r->reply, "annotator", json_string(who->name));
    if (who->kind) json_object_set_new(r->reply, "annotator_type", json_string(who->kind));
    if (who->domains) json_object_set(r->reply, "domains", who->domains);
    else json_object_set_new(r->reply, "domains", json_array());
    json_object_set_new(r->reply, "progress", label_progress(s->l, w));
    return 200;
}

static int serve_compare(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* One annotator for the operator's eyes. */
static json_t *serve_report(const label_who *who) {
    int right = 0, total = 0, n = 0;
    double *seconds = calloc((size_t)who->n_votes + 1, sizeof *seconds), median = 0;
    for (int i = 0; i < who->n_votes; i++) {
        const label_vote *v = who->vote + i;
        right += v->right == 1, total += v->right >= 0;
        if (seconds && v->seconds > 0) seconds[n++] = v->seconds;
    }
    if (n) {
        qsort(seconds, (size_t)n, sizeof *seconds, serve_compare);
        median = n % 2 ? seconds[n / 2] : (seconds[n / 2 - 1] + seconds[n / 2]) / 2;
    }
    free(seconds);
    json_t *j = json_pack("{s:s,s:i,s:i,s:i,s:o}", "annotator", who->name, "done", who->n_votes,
                          "gold_right", right, "gold_total", total, "seconds_median",
                          n ? json_real(median) : json_null());
    if (who->kind) json_object_set_new(j, "annotator_type", json_string(who->kind));
    if (who->domains) json_object_set(j, "domains", who->domains);
    return j;
}

static void serve_link(const serve *s, const char *token, char *url, size_t size) {
    snprintf(url, size, "http://%s:%d/#%s", s->host, s->port, token);
}

static int serve_operator(serve *s, serve_request *r) {
    const label *l = s->l;
    int total = 0, finished = 0;
    char url[256];
    json_t *people = json_array(), *links = json_array();
    for (int w = 0; w < l->n_whos; w++) {
        const label_who *who = l->who + w;
        json_t *j = serve_report(who);
        if (l->qualify) {
            json_t *q = json_object();
            for (int i = 0; i < who->n_vets; i++)
                json_object_set_new(q, who->vet[i].domain, json_boolean(who->vet[i].passed));
            json_object_set_new(j, "qualified", q);
        }
        json_array_append_new(people, j);
        if (!who->invited) continue;
        serve_link(s, who->token, url, sizeof url);
        json_array_append_new(links, json_pack("{s:s,s:s}", "annotator", who->name, "url", url));
    }
    for (int i = 0; i < l->n_items; i++) {
        total += l->item[i].gold < 0;
        finished += l->item[i].gold < 0 && l->item[i].counted >= l->c->per_item;
    }
    r->reply = json_pack("{s:o,s:{s:i,s:i,s:i},s:o}", "annotators", people, "items", "total", total,
                         "finished", finished, "judgements", l->judgements, "links", links);
    return r->status = 200;
}

/* Judgements, texts and what takes them back. The answer waits until they are on the disk. */
static int serve_post(serve *s, serve_request *r, int w, const char *url) {
    label *l = s->l;
    json_error_t e;
    char text[256];
    json_t *said = json_loadb(r->n ? r->body : "", r->n, JSON_REJECT_DUPLICATES, &e), *before;
    if (!json_is_object(said)) {
        if (said) snprintf(text, sizeof text, "the body is no JSON object");
        else snprintf(text, sizeof text, "the body is no JSON: line %d: %s", e.line, e.text);
        json_decref(said);
        return serve_error(r, 400, text);
    }
    int undo = !strcmp(url, "/api/undo"), status;
    if (undo) status = label_undo(l, w, &before);
    else if (!strcmp(url, "/api/write")) status = label_write(l, w, said);
    else status = label_judge(l, w, said);
    json_decref(said);
    if (status != 200) return serve_error(r, status, l->error);
    r->reply = json_object();
    if (undo) {
        serve_put(s, r, w, l->who[w].current);
        json_object_set_new(r->reply, "judgement", before);
    } else {
        json_object_set_new(r->reply, "ok", json_true());
        json_object_set_new(r->reply, "progress", label_progress(l, w));
    }
    return r->status = 200;
}

/* Who asks for what; the answer goes into r. */
static int serve_dispatch(serve *s, serve_request *r, const char *url, const char *method) {
    static const struct {
        const char *url, *method;
    } calls[] = {{"/api/session", "GET"}, {"/api/next", "GET"},   {"/api/operator", "GET"},
                 {"/api/judge", "POST"},  {"/api/write", "POST"}, {"/api/undo", "POST"}};
    const char *bearer =
        MHD_lookup_connection_value(r->connection, MHD_HEADER_KIND, "Authorization");
    int known = -1;
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!strcmp(url, calls[i].url)) known = (int)i;
    if (known < 0) return serve_error(r, 404, "there is nothing at this address");
    if (strcmp(method, calls[known].method))
        return serve_error(r, 405, "this address takes another method");
    int w = bearer && !strncasecmp(bearer, "Bearer ", 7) ? serve_who(s->l, bearer + 7) : -2;
    if (w == -2) return serve_error(r, 401, "this link is not known here; ask for a new one");
    if (w >= 0 && !serve_allow(s->l->who + w, base_now()))
        return serve_error(r, 429, "too many requests; wait a second");
    if (known == 0) return serve_session(s, r, w);
    if (known == 2)
        return w < 0 ? serve_operator(s, r) : serve_error(r, 403, "this is for the operator");
    if (w < 0) return serve_error(r, 403, "this is for annotators");
    if (known > 2) return serve_post(s, r, w, url);
    r->reply = json_object();
    serve_put(s, r, w, label_next(s->l, w));
    return r->status = 200;
}

/* ---- connections ---- */

/* A body's next piece; what is beyond the limit is read and thrown away, for a while. */
static enum MHD_Result serve_take(serve_request *r, const char *data, size_t n) {
    if (r->n + n > SERVE_BODY) {
        r->n += n;
        return r->n > SERVE_DRAIN ? MHD_NO : MHD_YES;
    }
    if (r->n + n > r->cap) {
        r->cap = 2 * (r->n + n);
        char *grown = realloc(r->body, r->cap);
        if (!grown) return MHD_NO;
        r->body = grown;
    }
    memcpy(r->body + r->n, data, n);
    r->n += n;
    return MHD_YES;
}

/* libmicrohttpd calls this when a request begins, for each piece of its body, at its end, and again
 * when it was resumed. */
static enum MHD_Result serve_request_step(void *user, struct MHD_Connection *connection,
                                          const char *url, const char *method, const char *version,
                                          const char *data, size_t *size, void **state) {
    serve *s = user;
    serve_request *r = *state;
    const char *type;
    (void)version;
    if (!r) {
        *state = r = calloc(1, sizeof *r);
        if (!r) return MHD_NO;
        r->connection = connection;
        const char *length =
            MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Content-Length");
        if (!length || strtoull(length, NULL, 10) <= SERVE_DRAIN) return MHD_YES;
        serve_error(r, 413, "the body is larger than 1 MiB");
        return serve_send_json(connection, r->status, r->reply);
    }
    if (*size) {
        enum MHD_Result taken = serve_take(r, data, *size);
        *size = 0;
        return taken;
    }
    if (!r->status) {
        const char *host = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Host");
        const char *page = serve_page(url, &type);
        if (!serve_host_ok(s, host))
            serve_error(r, 403, "this server has another name; see --host");
        else if (r->n > SERVE_BODY) serve_error(r, 413, "the body is larger than 1 MiB");
        else if (page && strcmp(method, "GET") && strcmp(method, "HEAD"))
            serve_error(r, 405, "this address takes another method");
        else if (page) {
            size_t n;
            const char *text = page_text(page, &n);
            return serve_send(connection, 200,
                              MHD_create_response_from_buffer(n, (void *)(uintptr_t)text,
                                                              MHD_RESPMEM_PERSISTENT),
                              type, 0);
        } else {
            serve_dispatch(s, r, url, method);
        }
        if (s->l->dirty && !strcmp(method, "POST")) {
            r->next = s->waiting;
            s->waiting = r;
            MHD_suspend_connection(connection);
            return MHD_YES;
        }
    }
    return serve_send_json(connection, r->status, r->reply);
}

static void serve_request_end(void *user, struct MHD_Connection *connection, void **state,
                              enum MHD_RequestTerminationCode code) {
    serve_request *r = *state;
    (void)user, (void)connection, (void)code;
    if (!r) return;
    json_decref(r->reply);
    free(r->body);
    free(r);
    *state = NULL;
}

/* Puts what was judged on the disk, then lets the answers go. A disk that refuses ends the program:
 * what it kept is no longer known. */
static void serve_flush(serve *s) {
    int error = label_sync(s->l);
    if (error) {
        fprintf(stderr, "rlhf: %s: cannot write: %s\n", s->l->out, strerror(error));
        s->failed = 1;
    }
    while (s->waiting) {
        serve_request *r = s->waiting;
        s->waiting = r->next;
        if (error) {
            json_decref(r->reply);
            serve_error(r, 500, "not saved: the disk refuses");
        }
        MHD_resume_connection(r->connection);
    }
}

/* Serves what has arrived, or waits for it, so many milliseconds at most. */
static void serve_poll(serve *s, int wait) {
    MHD_run_wait(s->daemon, wait);
    while (s->waiting || s->l->dirty) {
        serve_flush(s);
        MHD_run_wait(s->daemon, 0);
    }
}

/* Listens on --host and --port. Returns null, or what is wrong. */
static const char *serve_open(serve *s, label *l) {
    static char text[256];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *a;
    char port[16];
    s->l = l;
    snprintf(port, sizeof port, "%d", (int)l->c->port);
    int failed = getaddrinfo(l->c->host, port, &hints, &a);
    if (failed) {
        snprintf(text, sizeof text, "--host %s: %s", l->c->host, gai_strerror(failed));
        return text;
    }
    unsigned flags = MHD_ALLOW_SUSPEND_RESUME;
    if (MHD_is_feature_supported(MHD_FEATURE_EPOLL) == MHD_YES) flags |= MHD_USE_EPOLL;
    if (a->ai_family == AF_INET6) flags |= MHD_USE_IPv6;
    errno = 0;
    s->daemon = MHD_start_daemon(
        flags, (uint16_t)l->c->port, NULL, NULL, serve_request_step, s, MHD_OPTION_SOCK_ADDR,
        a->ai_addr, MHD_OPTION_NOTIFY_COMPLETED, serve_request_end, s, MHD_OPTION_CONNECTION_LIMIT,
        (unsigned)SERVE_CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)SERVE_IDLE,
        MHD_OPTION_LISTENING_ADDRESS_REUSE, 1u, MHD_OPTION_END);
    int is_six = a->ai_family == AF_INET6;
    freeaddrinfo(a);
    if (!s->daemon) {
        snprintf(text, sizeof text, "cannot listen on %s:%s: %s", l->c->host, port,
                 errno ? strerror(errno) : "the system refuses");
        return text;
    }
    s->port = MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_BIND_PORT)->port;
    if (!strcmp(l->c->host, "0.0.0.0") || !strcmp(l->c->host, "::"))
        gethostname(s->host, sizeof s->host - 1);
    else snprintf(s->host, sizeof s->host, is_six ? "[%s]" : "%s", l->c->host);
    return NULL;
}

static void serve_close(serve *s) {
    if (!s->daemon) return;
    serve_flush(s);
    MHD_run_wait(s->daemon, 0);
    MHD_stop_daemon(s->daemon);
}

#endif

/* ---- terminal ---- */

/* Prints n bytes of a text; what would steer the terminal is shown as \xNN: control characters in
 * one byte, and those that UTF-8 writes in two, 0xC2 and one below 0xA0. */
static void serve_show(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        unsigned char b = (unsigned char)s[i], next = i + 1 < n ? (unsigned char)s[i + 1] : 0;
        if ((b < 0x20 && b != '\n' && b != '\t') || b == 0x7f) printf("\\x%02x", b);
        else if (b == 0xC2 && next >= 0x80 && next < 0xA0) printf("\\xc2\\x%02x", next), i++;
        else putchar(b);
    }
}

static void serve_print(const char *s) {
    serve_show(s, strlen(s));
    putchar('\n');
}

static void serve_print_item(const json_t *shown, const json_t *progress) {
    size_t i;
    json_t *turn, *answer;
    printf("\n==== %lld of %lld",
           (long long)json_integer_value(json_object_get(progress, "done")) + 1,
           (long long)json_integer_value(json_object_get(progress, "total")));
    const char *domain = json_string_value(json_object_get(shown, "domain"));
    printf("%s%s ====\n", *domain ? " · " : "", domain);
    json_array_foreach(json_object_get(shown, "prompt"), i, turn) {
        printf("[%s] ", json_string_value(json_object_get(turn, "role")));
        serve_print(json_string_value(json_object_get(turn, "content")));
    }
    json_array_foreach(json_object_get(shown, "answers"), i, answer) {
        printf("---- %c ----\n", "AB"[i]);
        serve_print(json_string_value(answer));
    }
    if (json_object_get(shown, "draft")) {
        printf("---- draft ----\n");
        serve_print(json_string_value(json_object_get(shown, "draft")));
    }
}

/* A line of standard input without its end; null at the end of input. What comes from no keyboard
 * is not seen either: then the question's line is ended here. */
static char *serve_line(char **line, size_t *cap) {
    fflush(stdout);
    ssize_t n = getline(line, cap, stdin);
    if (n < 0 || !isatty(STDIN_FILENO)) putchar('\n');
    if (n < 0) return NULL;
    while (n && strchr("\r\n", (*line)[n - 1])) (*line)[--n] = 0;
    return *line;
}

/* Asks for each aspect; an empty line leaves one out. */
static void serve_ask_aspects(const label *l, json_t *said, char **line, size_t *cap) {
    size_t i;
    json_t *name, *given = json_object();
    json_array_foreach(l->aspects, i, name) {
        printf("%s (a, b, t or empty) ", json_string_value(name));
        const char *key = serve_line(line, cap), *at = key && *key ? strchr("abt", *key) : NULL;
        if (at)
            json_object_set_new(given, json_string_value(name),
                                json_string(label_words[*at == 't' ? LABEL_TIE : *at - 'a']));
    }
    json_object_set_new(said, "aspects", given);
}

/* Reads what to do with an item into said. Returns 'j' to judge, 'u', 'q', or 0: not understood. */
static int serve_ask(const label *l, json_t *said, char **line, size_t *cap) {
    static const char keys[] = "abtns";
    if (l->write)
        printf("Your answer, ended by a line with a single dot; or s skip, u undo, q quit:\n");
    else printf("a, b (1 to 3 behind it: how much), t tie, n neither, s skip, u undo, q quit: ");
    char *in = serve_line(line, cap);
    if (!in || !strcmp(in, "q")) return 'q';
    if (!strcmp(in, "u")) return 'u';
    if (l->write && !strcmp(in, "s")) return json_object_set_new(said, "skip", json_true()), 'j';
    if (l->write) {
        char *text = NULL;
        size_t n = 0;
        FILE *f = open_memstream(&text, &n);
        for (int first = 1; in && strcmp(in, "."); first = 0) {
            fprintf(f, "%s%s", first ? "" : "\n", in);
            in = serve_line(line, cap);
        }
        fclose(f);
        json_object_set_new(said, "text", json_string(text));
        free(text);
        return in ? 'j' : 'q';
    }
    const char *at = *in ? strchr(keys, *in) : NULL;
    if (!at || (in[1] && (!strchr("123", in[1]) || in[2]))) return 0;
    json_object_set_new(said, "choice", json_string(label_words[at - keys]));
    if (in[1]) json_object_set_new(said, "strength", json_integer(in[1] - '0'));
    if (at - keys != LABEL_SKIP) serve_ask_aspects(l, said, line, cap);
    return 'j';
}

/* Asks annotator w on standard input and output until there is nothing left, or they quit. more:
 * called before each item; returns an exit code other than 0 to end. */
static int serve_tty(label *l, int w, int (*more)(void *user), void *user) {
    char *line = NULL;
    size_t cap = 0;
    int code = 0, item, what = 0;
    json_t *before = NULL;
    while (what != 'q' && !(code = more(user)) && (item = label_next(l, w)) >= 0) {
        json_t *shown = label_show(l, w, item), *progress = label_progress(l, w);
        json_t *said = json_pack("{s:O,s:O}", "id", json_object_get(shown, "id"), "token",
                                 json_object_get(shown, "token"));
        serve_print_item(shown, progress);
        double began = base_now();
        what = serve_ask(l, said, &line, &cap);
        json_object_set_new(said, "seconds", json_real(round((base_now() - began) * 10) / 10));
        int status = 200;
        if (what == 'u' && (status = label_undo(l, w, &before)) == 200) json_decref(before);
        else if (what == 'j') status = l->write ? label_write(l, w, said) : label_judge(l, w, said);
        int error = label_sync(l);
        if (!what) printf("not understood\n");
        if (status != 200) printf("not saved: %s\n", l->error);
        else if (error) code = 1, fprintf(stderr, "rlhf: %s: %s\n", l->out, strerror(error));
        else if (what == 'j') printf("saved\n");
        json_decref(shown), json_decref(progress), json_decref(said);
        if (code) break;
    }
    free(line);
    return code;
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 40 CLI (cli_)
 * The program. Commands are rows of a table; options come from two tables, the commands' own and
 * the configurations of rlhf.h, so that parsing, checking, --help and --config know the same
 * names. Results go to stdout, progress and messages to stderr.
 * Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted with the state saved.
 * ============================================================================================ */

#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <signal.h>

/* name, argument, help */
#define CLI_OPTIONS(X)                                                                             \
    X(model, "DIR", "Hugging Face model directory")                                                \
    X(init, "FILE", "config.json of a new model with random weights (default: --model)")           \
    X(tokenizer, "DIR", "tokenizer directory; default: the model's")                               \
    X(data, "FILE", "records: .jsonl, one object a line, or .json, an array; also .gz")            \
    X(eval_data, "FILE", "records for evaluation (default none)")                                  \
    X(out, "PATH", "directory or file of the result (generate, score: default standard output)")   \
    X(reward, "DIR", "reward model directory")                                                     \
    X(ref, "DIR", "reference model: also report KL to it (default none)")                          \
    X(prompt, "TEXT", "the prompt; default: one prompt a line from standard input")                \
    X(raters, "FILE", "what `rlhf raters --json` printed, to show annotators (default none)")      \
    X(train, "FILE", "text to learn the vocabulary from; more files may follow")                   \
    X(vocab_size, "N", "entries of the vocabulary, at least 257 (default 512)")                    \
    X(gguf, "TYPE", "how numbers are stored: " GGUF_KINDS " (norms and biases always f32)")        \
    X(merge, NULL, "write an adapter and its base as one model directory (default off)")           \
    X(save_dtype, "TYPE", "with --merge, numbers that no file has yet: f32 or bf16 (default f32)") \
    X(system, "TEXT", "the system text that begins the conversation (default: the template's)")    \
    X(type, "KIND", "text or preference; default: what the model is for")                          \
    X(chat_template, "NAME", "how conversations are rendered; see below (default auto)")           \
    X(continue, NULL, "a further round: sample from a newer checkpoint into the same file")        \
    X(dry_run, NULL, "show the first records, what bears loss, what is dropped; write nothing")    \
    X(quick, NULL, "fewer shapes and repetitions (default off)")                                   \
    X(config, "FILE", "JSON object with options; the command line wins (default none)")            \
    X(threads, "N", "worker threads; the result does not depend on it (default: all processors)")  \
    X(isa, "NAME", "kernels: auto or one that `rlhf info` lists; f32: same bits (default auto)")   \
    X(dtype, "TYPE", "numbers that matrix products multiply: f32 or bf16 (default f32)")           \
    X(seed, "N", "seed of every random choice; here nothing is random (default 42)")               \
    X(max_steps, "N", "stop after so many steps, records or lines (default all)")                  \
    X(json, NULL, "end standard output with one JSON object, the results (default off)")           \
    X(quiet, NULL, "no progress and no messages, only results and errors (default off)")           \
    X(help, NULL, "this text")

enum {
#define CLI_ENUM(name, arg, help) O_##name,
    CLI_OPTIONS(CLI_ENUM)
#undef CLI_ENUM
        O_COUNT
};

static const struct {
    const char *name, *arg, *help;
} cli_options[O_COUNT] = {
#define CLI_ROW(name, arg, help) {#name, arg, help},
    CLI_OPTIONS(CLI_ROW)
#undef CLI_ROW
};

enum { CLI_DROPS = 20 }; /* dropped records that --dry_run lists */

#define CLI_BIT(name) (1u << O_##name)
#define CLI_COMMON                                                                                 \
    (CLI_BIT(config) | CLI_BIT(threads) | CLI_BIT(isa) | CLI_BIT(dtype) | CLI_BIT(seed) |          \
     CLI_BIT(max_steps) | CLI_BIT(json) | CLI_BIT(quiet) | CLI_BIT(help))

typedef union cli_config {
    rlhf_sft_config sft;
    rlhf_rm_config rm;
    rlhf_ppo_config ppo;
    rlhf_generate_config gen;
    rlhf_eval_config eval;
    rlhf_raters_config raters;
    label_config label;
} cli_config;

enum { CLI_LABEL = 100 }; /* as a kind of configuration: that of 37, which the library has not */

struct cli;

typedef struct cli_command {
    const char *name, *what, *usage;
    unsigned options;
    int config; /* rlhf_config_kind of further options, or CLI_LABEL; -1: none */
    int (*run)(struct cli *c);
} cli_command;

typedef struct cli {
    const cli_command *cmd;
    const char *v[O_COUNT];
    char **more; /* further arguments */
    int n_more;
    cli_config config;
    uint64_t set; /* rows of the configuration's table that the command line named */
    json_t *file;  /* --config */
    json_t *about; /* what run.json says besides the configuration */
    rlhf_ctx *ctx;
    int tty, line; /* a progress line stands on the terminal */
    int drops;     /* records that --dry_run told of */
    struct talk *talk;
    double shown;
    struct serve *serve; /* goes on while the library works; may be null */
} cli;

static volatile sig_atomic_t cli_interrupted; /* the signal, or 0 */

static void cli_on_signal(int signal_number) { cli_interrupted = signal_number; }

/* The first signal from now on is the handler's; a second one ends the program at once. */
static void cli_catch_signals(void (*handler)(int)) {
    struct sigaction on_signal = {.sa_handler = handler, .sa_flags = (int)SA_RESETHAND};
    cli_interrupted = 0;
    sigaction(SIGINT, &on_signal, NULL);
    sigaction(SIGTERM, &on_signal, NULL);
}

/* ---- output ---- */

static void cli_clear(cli *c) {
    if (c->line) fprintf(stderr, "\r\033[K");
    c->line = 0;
}

RLHF_PRINTF(2, 3)
static int cli_fail(cli *c, const char *format, ...) {
    va_list args;
    cli_clear(c);
    fprintf(stderr, "rlhf: ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    return 1;
}

/* The last error of the context as an exit code. */
static int cli_error(cli *c, rlhf_status status) {
    if (status == RLHF_STOPPED) {
        cli_fail(c, "interrupted");
        return 130;
    }
    const char *text = rlhf_error(c->ctx);
    return cli_fail(c, "%s", *text ? text : rlhf_status_text(status));
}

static void cli_log(void *user, rlhf_level level, const char *text) {
    cli *c = user;
    if (c->v[O_quiet]) return;
    if (level == RLHF_LOG_DEBUG && (!c->v[O_dry_run] || c->drops > CLI_DROPS)) return;
    if (level == RLHF_LOG_DEBUG && c->drops++ == CLI_DROPS) text = "further ones are not listed";
    cli_clear(c);
    fprintf(stderr, "rlhf: %s%s\n", level == RLHF_LOG_WARNING ? "warning: " : "", text);
}

/* The metrics worth a line, in this order, where they exist. */
static void cli_print_metrics(const char *text) {
    static const char *const keys[] = {"loss",
                                       "eval_loss",
                                       "mean_token_accuracy",
                                       "accuracy",
                                       "eval_accuracy",
                                       "objective/scores",
                                       "objective/rlhf_reward",
                                       "objective/kl",
                                       "objective/kl_exact",
                                       "objective/entropy",
                                       "policy/approxkl_avg",
                                       "policy/clipfrac_avg",
                                       "loss/value_avg",
                                       "completions/mean_length",
                                       "grad_norm",
                                       "learning_rate",
                                       "lr"};
    json_t *j = json_loads(text, 0, NULL);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const json_t *v = json_object_get(j, keys[i]);
        if (v) fprintf(stderr, "  %s %.4g", keys[i], json_number_value(v));
    }
    json_decref(j);
}

static int cli_progress(void *user, const rlhf_progress *p) {
    cli *c = user;
    double rate = p->seconds > 0 ? (double)p->tokens / p->seconds : 0;
    double left = p->done > 0 ? p->seconds / (double)p->done * (double)(p->total - p->done) : 0;
    int show = p->metrics != NULL || (c->tty && p->seconds - c->shown > 0.2);
    if (!c->v[O_quiet] && show) {
        if (c->tty) fprintf(stderr, "\r\033[K");
        fprintf(stderr, "%s %lld/%lld", p->what, (long long)p->done, (long long)p->total);
        if (p->metrics) cli_print_metrics(p->metrics);
        fprintf(stderr, "  %.0f tok/s  %02d:%02d left", rate, (int)(left / 60), (int)left % 60);
        c->line = c->tty && !p->metrics;
        if (!c->line) fprintf(stderr, "\n");
        c->shown = p->seconds;
    }
#ifndef RLHF_NO_HTTP
    if (c->serve) serve_poll(c->serve, 0);
#endif
    return cli_interrupted;
}

/* Prints the results as the last line, if --json. Takes the reference. */
static int cli_results(cli *c, json_t *j) {
    cli_clear(c);
    if (c->v[O_json]) {
        char *text = json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(12));
        printf("%s\n", text ? text : "{}");
        free(text);
    }
    json_decref(j);
    return fflush(stdout) ? cli_fail(c, "standard output: %s", strerror(errno)) : 0;
}

/* ---- help ---- */

/* How the stages read forms of records that were not made for them; by rlhf_config_kind. */
static const char *const cli_notes[RLHF_CONFIG_GENERATE + 1] = {
    "Records: text, messages, prompt + completion and the other forms that README lists. Of\n"
    "answers with a label those that say true are learnt; of a ranking or a pair, the best one.\n",
    "Records: chosen + rejected, with or without prompt; prompt + responses + ranking (or best):\n"
    "all pairs of a ranking, which together weigh as much as one record; answers with a label:\n"
    "each true one is paired with each false one to the same prompt, others are dropped.\n",
    "Records: a prompt, or any other form: then what precedes its last answer is the prompt.\n",
    NULL};

static void cli_print_default(const rlhf_field *f, char *out, size_t size) {
    if (f->kind == 'S') snprintf(out, size, "%s", f->text[0] ? f->text : "\"\"");
    else if (f->kind == 'B') snprintf(out, size, "%s", f->def != 0 ? "true" : "false");
    else snprintf(out, size, "%g", f->def);
}

/* The table of a command's further options; *n becomes its length. */
static const rlhf_field *cli_fields(const cli_command *cmd, int *n) {
    *n = cmd->config == CLI_LABEL ? (int)(sizeof label_fields / sizeof *label_fields) : 0;
    if (cmd->config == CLI_LABEL) return label_fields;
    return cmd->config < 0 ? NULL : rlhf_config_fields((rlhf_config_kind)cmd->config, n);
}

static int cli_named_by_config(const cli_command *cmd, const char *name) {
    int n = 0;
    const rlhf_field *f = cli_fields(cmd, &n);
    for (int i = 0; i < n; i++)
        if (!strcmp(f[i].name, name)) return i;
    return -1;
}

static void cli_help(const cli_command *cmd) {
    printf("rlhf %s - %s\n\n  rlhf %s %s\n\nOptions ('-' and '_' are the same):\n", cmd->name,
           cmd->what, cmd->name, cmd->usage);
    for (int i = 0; i < O_COUNT; i++) {
        if (!(cmd->options & 1u << i) || cli_named_by_config(cmd, cli_options[i].name) >= 0)
            continue;
        char left[64];
        snprintf(left, sizeof left, "--%s %s", cli_options[i].name,
                 cli_options[i].arg ? cli_options[i].arg : "");
        printf("  %-34s %s\n", left, cli_options[i].help);
    }
    int n = 0;
    const rlhf_field *f = cli_fields(cmd, &n);
    for (int i = 0; i < n; i++) {
        char left[160], def[64];
        cli_print_default(f + i, def, sizeof def);
        snprintf(left, sizeof left, "--%s %s", f[i].name, def);
        printf("  %-34s %s%s%s%s\n", left, f[i].help, f[i].choices ? " (" : "",
               f[i].choices ? f[i].choices : "", f[i].choices ? ")" : "");
    }
    if (cmd->config >= 0 && cmd->config <= RLHF_CONFIG_GENERATE && cli_notes[cmd->config])
        printf("\n%s", cli_notes[cmd->config]);
    if (cmd->options & 1u << O_chat_template)
        printf("\nChat templates: %s\n", rlhf_chat_templates());
}

/* ---- options ---- */

static int cli_same(const char *a, const char *b) {
    for (; *a && *b; a++, b++)
        if ((*a == '-' ? '_' : *a) != (*b == '-' ? '_' : *b)) return 0;
    return !*a && !*b;
}

/* Edit distance, for suggestions. */
static int cli_distance(const char *a, const char *b) {
    int row[64], n = (int)strlen(b);
    if (n > 62 || strlen(a) > 62) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int corner = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int up = row[j], same = a[i - 1] == b[j - 1] || (a[i - 1] == '-' && b[j - 1] == '_');
            row[j] = base_min(base_min(row[j], row[j - 1]) + 1, corner + !same);
            corner = up;
        }
    }
    return row[n];
}

static int cli_unknown(cli *c, const char *name) {
    const char *best = NULL;
    int least = 4, n = 0;
    const rlhf_field *f = cli_fields(c->cmd, &n);
    for (int i = 0; i < O_COUNT + n; i++) {
        const char *known = i < O_COUNT ? cli_options[i].name : f[i - O_COUNT].name;
        if (i < O_COUNT && !(c->cmd->options & 1u << i)) continue;
        int d = cli_distance(name, known);
        if (d < least) least = d, best = known;
    }
    if (best) cli_fail(c, "%s: unknown option --%s; did you mean --%s?", c->cmd->name, name, best);
    else
        cli_fail(c, "%s: unknown option --%s; `rlhf %s --help` lists them", c->cmd->name, name,
                 c->cmd->name);
    return 2;
}

/* ---- TRL's names ---- */

/* What TRL calls otherwise. */
static const char *const cli_aliases[][2] = {
    {"model_name_or_path", "model"},     {"sft_model_path", "model"},
    {"reward_model_path", "reward"},     {"dataset_name", "data"},
    {"resume_from_checkpoint", "resume"}, {"activation_checkpointing", "gradient_checkpointing"},
    {"max_seq_length", "max_length"}};

/* Options of TRL's SFTConfig, RewardConfig, PPOConfig, ModelConfig and ScriptArguments that have no
 * counterpart: their names, the values that ask for what happens anyway and are taken as said, and
 * what is to be known about the others. */
static const struct {
    const char *names, *values, *why;
} cli_trl[] = {
    {"packing packing_strategy eval_packing padding_free pad_to_multiple_of pad_token", "false",
     "sequences lie next to each other without padding; there is nothing to pack or to pad"},
    {"truncation_mode", NULL,
     "a record longer than --max_length is dropped and counted, never cut"},
    {"dataset_text_field", "text", "a text is read from \"text\"; other forms are in README.md"},
    {"dataset_kwargs dataset_num_proc dataset_config dataset_streaming label_names "
     "length_column_name dataloader_drop_last dataloader_num_workers "
     "dataloader_prefetch_factor dataloader_multiprocessing_context",
     "false|0|length",
     "records are read from --data before the run, in every form that README.md lists"},
    {"dataset_train_split dataset_test_split model_revision", "train|test|main",
     "--model, --data and --eval_data name files of this machine"},
    {"completion_only_loss assistant_only_loss", "true",
     "loss is taken on completions and on the assistant's turns; to learn all, give \"text\""},
    {"loss_type", "nll", "the loss is the mean negative log-likelihood"},
    {"label_smoothing_factor neftune_noise_alpha router_aux_loss_coef", "0|0.0",
     "the loss is what is written in rlhf.h, without further terms"},
    {"eos_token stop_token", "eos",
     "the end is the tokenizer's end-of-text token of tokenizer_config.json; ppo: --stop_token_id"},
    {"chat_template_path", NULL, "templates have names; say --chat_template NAME"},
    {"disable_dropout", "true", "the model's own dropout is off; adapters have --lora_dropout"},
    {"bf16 bf16_full_eval", "false", "say --dtype bf16, and --save_dtype bf16 for the files"},
    {"fp16 fp16_full_eval tf32", "false", "numbers are f32 or bf16; say --dtype"},
    {"load_in_8bit load_in_4bit use_bnb_nested_quant bnb_4bit_quant_type bnb_4bit_quant_storage",
     "false", "weights are not quantised in training; frozen ones stay as the file has them"},
    {"use_dora lora_target_parameters", "false",
     "adapters are LoRA or rsLoRA, on matrices; say --lora_target_modules"},
    {"lora_modules_to_save", "score",
     "beside the adapters, a reward model's score head is trained, nothing else"},
    {"lora_task_type", "CAUSAL_LM|SEQ_CLS", "the command says it: sft and ppo, or rm"},
    {"model_adapter_name ref_adapter_name", NULL,
     "an adapter is a directory; say --model, the reference is the model that ppo starts from"},
    {"model_init_kwargs trust_remote_code", "false",
     "a model is what its config.json says; no code comes with it"},
    {"attn_implementation use_liger_kernel liger_kernel_config torch_compile "
     "torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cache "
     "activation_offloading gradient_checkpointing_kwargs activation_checkpointing_kwargs",
     "false", "there is one way of computing, which keeps neither logits nor attention matrices"},
    {"optim optim_args optim_target_modules", "adamw_torch|adamw_torch_fused|adamw_hf",
     "the optimizer is AdamW; see --adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay"},
    {"lr_scheduler_kwargs warmup_ratio", "0|0.0",
     "the schedule has no further values; say --lr_scheduler_type and --warmup_steps"},
    {"average_tokens_across_devices", "true", "a loss is the mean over all tokens of a step"},
    {"auto_find_batch_size", "false", "say --per_device_train_batch_size"},
    {"per_device_eval_batch_size eval_accumulation_steps local_rollout_forward_batch_size",
     NULL, "evaluation and generation choose their batches; no result depends on them"},
    {"eval_strategy", "steps|no", "say --eval_steps; without --eval_data nothing is evaluated"},
    {"eval_delay eval_on_start", "0|false", "say --eval_steps"},
    {"logging_strategy", "steps", "say --logging_steps"},
    {"save_strategy", "steps", "say --save_steps; the end of a run is always saved"},
    {"save_total_limit save_only_model save_on_each_node enable_jit_checkpoint", "1|false",
     "one checkpoint is kept, the last, with all it takes to go on"},
    {"logging_first_step logging_nan_inf_filter include_num_input_tokens_seen", "false|no",
     "metrics come each --logging_steps steps; a loss that is no number ends the run"},
    {"log_level log_level_replica disable_tqdm debug", "passive|warning", "say --quiet"},
    {"report_to", "tensorboard|none",
     "metrics.jsonl and event files for TensorBoard are in the run directory, nothing is sent"},
    {"run_name project trackio_space_id trackio_bucket_id trackio_static_space_id", NULL,
     "a run is its directory; say --output_dir"},
    {"push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
     "hub_revision",
     "false", "nothing is uploaded; the run directory is what the Hub takes"},
    {"load_best_model_at_end metric_for_best_model greater_is_better", "false",
     "the last step's model is kept; metrics.jsonl says which was best, --max_steps ends there"},
    {"include_for_metrics batch_eval_metrics prediction_loss_only", "false",
     "the metrics are those in metrics.jsonl"},
    {"ignore_data_skip restore_callback_states_from_checkpoint", "false",
     "--resume goes on exactly where the run stopped"},
    {"full_determinism use_cpu remove_unused_columns dataloader_pin_memory dataloader_in_order "
     "dataloader_persistent_workers eval_do_concat_batches eval_use_gather_object "
     "log_on_each_node skip_memory_metrics do_train do_eval do_predict",
     "true|false", "expected true or false; neither changes anything"},
    {"data_seed", NULL, "say --seed, which also orders the records"},
    {"train_sampling_strategy group_by_length", "random|false",
     "say --shuffle_dataset; lengths do not matter without padding"},
    {"ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
     "ddp_backend ddp_timeout fsdp fsdp_config deepspeed accelerator_config parallelism_config "
     "local_rank world_size ds3_gather_for_generation ignore_bias_buffers",
     "-1|1|false", "a run is one process on one machine; say --threads"},
    {"total_episodes num_total_batches", NULL,
     "say --max_steps, the number of updates of --batch_size episodes, or --num_train_epochs"},
    {"mini_batch_size local_batch_size local_mini_batch_size micro_batch_size", NULL,
     "say --batch_size and --num_mini_batches; --per_device_train_batch_size bounds memory"},
    {"num_sample_generations", "0", "`rlhf generate` shows what a model answers"}};

/* Whether the words of a list, separated by spaces, have the name among them. */
static int cli_listed(const char *list, const char *name) {
    char word[64];
    for (int n; sscanf(list, "%63s%n", word, &n) == 1; list += n)
        if (cli_same(name, word)) return 1;
    return 0;
}

/* An option of TRL's without a counterpart: taken where it asks for what happens anyway, else an
 * error that says what to use. Returns an exit code, -1: not such an option. */
static int cli_take_trl(cli *c, const char *name, const char *value, int *took) {
    for (size_t i = 0; i < sizeof cli_trl / sizeof *cli_trl; i++) {
        if (!cli_listed(cli_trl[i].names, name)) continue;
        *took = value != NULL;
        if (cli_trl[i].values && base_is_choice(cli_trl[i].values, value ? value : "true"))
            return 0;
        return cli_fail(c, "--%s: %s", name, cli_trl[i].why), 2;
    }
    return -1;
}

/* Sets one row of the configuration from text. */
static int cli_set_field(cli *c, const rlhf_field *f, const char *text) {
    char *at = (char *)&c->config + f->offset, *end;
    double x = strtod(text, &end);
    int ok = *text && !*end;
    if (f->kind == 'B') {
        int yes = !strcasecmp(text, "true") || !strcmp(text, "1"),
            no = !strcasecmp(text, "false") || !strcmp(text, "0");
        if (!yes && !no)
            return cli_fail(c, "--%s: \"%s\", expected true or false", f->name, text), 2;
        memcpy(at, &yes, sizeof yes);
        return 0;
    }
    if (f->kind == 'S') {
        if (f->choices && !base_is_choice(f->choices, text))
            return cli_fail(c, "--%s: \"%s\", expected one of %s", f->name, text, f->choices), 2;
        memcpy(at, &text, sizeof text);
        return 0;
    }
    if (!ok || !(x >= f->min && x <= f->max) || (f->kind == 'I' && x != floor(x)))
        return cli_fail(c, "--%s: \"%s\", expected %s from %.10g to %.10g", f->name, text,
                        f->kind == 'I' ? "an integer" : "a number", f->min, f->max),
               2;
    int64_t integer = (int64_t)x;
    if (f->kind == 'I') memcpy(at, &integer, sizeof integer);
    else memcpy(at, &x, sizeof x);
    return 0;
}

static int cli_is_boolean(const char *s) {
    return !strcasecmp(s, "true") || !strcasecmp(s, "false") || !strcmp(s, "1") || !strcmp(s, "0");
}

/* Takes one option; value null: there was none. bound: the value came with '=' or from a file, not
 * as the next argument. Returns an exit code, 0 to go on; *took: the value was used. */
static int cli_take(cli *c, const char *name, const char *value, int bound, int *took) {
    int n = 0;
    const rlhf_field *f = cli_fields(c->cmd, &n);
    *took = 1;
    for (size_t i = 0; i < sizeof cli_aliases / sizeof *cli_aliases; i++)
        if (cli_same(name, cli_aliases[i][0])) name = cli_aliases[i][1];
    for (int i = 0; i < n; i++) {
        if (!cli_same(name, f[i].name)) continue;
        if (f[i].kind == 'B' && (!value || (!bound && !cli_is_boolean(value)))) {
            *took = 0;
            value = "true";
        }
        if (!value) return cli_fail(c, "--%s needs a value", f[i].name), 2;
        if (c->file && c->set >> i & 1) return 0; /* --config comes last and does not override */
        c->set |= (uint64_t)1 << i;
        return cli_set_field(c, f + i, value);
    }
    for (int i = 0; i < O_COUNT; i++) {
        if (!(c->cmd->options & 1u << i) || !cli_same(name, cli_options[i].name)) continue;
        if (!cli_options[i].arg) {
            *took = 0;
            if (bound && !cli_is_boolean(value))
                return cli_fail(c, "--%s: \"%s\", expected true or false", name, value), 2;
            if (!bound || strchr("tT1", *value)) c->v[i] = "true";
            return 0;
        }
        if (!value)
            return cli_fail(c, "--%s needs a value (%s)", cli_options[i].name, cli_options[i].arg),
                   2;
        if (!c->v[i] || !c->file) c->v[i] = value;
        return 0;
    }
    int code = cli_take_trl(c, name, value, took);
    return code < 0 ? cli_unknown(c, name) : code;
}

/* A value of --config as the command line would say it, a list of texts with commas; null for what
 * it cannot say. Never freed, since what is set points to it. */
static char *cli_value(const json_t *v) {
    if (json_is_string(v)) return strdup(json_string_value(v));
    if (json_is_object(v)) return NULL;
    if (!json_is_array(v)) return json_dumps(v, JSON_ENCODE_ANY | JSON_REAL_PRECISION(17));
    char *list = strdup("");
    for (size_t i = 0; i < json_array_size(v); i++) {
        const char *one = json_string_value(json_array_get(v, i));
        char *more = one ? malloc(strlen(list) + strlen(one) + 2) : NULL;
        if (more) sprintf(more, "%s%s%s", list, i ? "," : "", one);
        free(list);
        if (!more) return NULL;
        list = more;
    }
    return list;
}

static int cli_take_file(cli *c) {
    json_error_t e;
    const char *key;
    json_t *v;
    if (!c->v[O_config]) return 0;
    c->file = json_load_file(c->v[O_config], 0, &e);
    if (!c->file && e.line > 0) return cli_fail(c, "%s:%d: %s", c->v[O_config], e.line, e.text);
    if (!c->file) return cli_fail(c, "%s", e.text);
    if (!json_is_object(c->file))
        return cli_fail(c, "%s: expected a JSON object with options by name", c->v[O_config]);
    json_object_foreach(c->file, key, v) {
        /* A run's own run.json may be replayed: it also says what wrote it. */
        if (!strcmp(key, "trainer") || !strcmp(key, "rlhf_version")) continue;
        if (json_is_null(v)) continue;
        const char *value = cli_value(v);
        if (!value)
            return cli_fail(c, "%s: \"%s\" is no number, text, list of texts, true or false",
                            c->v[O_config], key);
        int took, code = cli_take(c, key, value, 1, &took);
        if (code) return code;
    }
    return 0;
}

static int cli_parse(cli *c, int argc, char **argv) {
    c->more = argv;
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "--", 2)) {
            argv[c->n_more++] = argv[i];
            continue;
        }
        char name[128];
        const char *eq = strchr(argv[i], '='), *value = eq             ? eq + 1
                                                        : i + 1 < argc ? argv[i + 1]
                                                                       : NULL;
        snprintf(name, sizeof name, "%.*s",
                 (int)(eq ? eq - argv[i] - 2 : (ptrdiff_t)strlen(argv[i]) - 2), argv[i] + 2);
        /* What looks like an option is not a value, but a negative number is. */
        if (!eq && value && !strncmp(value, "--", 2)) value = NULL;
        int took = 0, code = cli_take(c, name, value, eq != NULL, &took);
        if (code) return code;
        i += took && !eq;
    }
    if (c->n_more && !c->v[O_train] && !base_is_choice("bench|raters|report", c->cmd->name))
        return cli_fail(c, "%s: unexpected argument \"%s\"", c->cmd->name, argv[0]), 2;
    return cli_take_file(c);
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 41 TALK (talk_)
 * A conversation in the terminal. A line of standard input is a turn of the user; the answer is
 * shown as its tokens come. Between turns only texts are kept: each answer starts from the whole
 * conversation anew, as `rlhf generate` would from a record of it.
 *
 * Entry: talk_open, talk_run.
 * Tests: test/test_cli.c
 * ============================================================================================ */

/* A conversation, and the answer at hand. */
typedef struct talk {
    cli *c;
    rlhf_model *m;
    rlhf_tokenizer *tok;
    const chat_template *chat;
    int32_t end;           /* the template's end of turn, -1: not a token */
    const char *stop;      /* then the text that ends an answer, or null */
    chat_message *message; /* with their contents from malloc */
    int n;
    int64_t answers, tokens;
    gen_item item;
    size_t shown; /* bytes of the answer that are on the screen */
} talk;

/* Appends a copy of a message; 0: out of memory. */
static int talk_add(talk *t, const char *role, const char *content) {
    chat_message *grown = realloc(t->message, (size_t)(t->n + 1) * sizeof *grown);
    if (grown) t->message = grown;
    char *copy = grown ? strdup(content) : NULL;
    if (copy) t->message[t->n++] = (chat_message){role, copy};
    return copy != NULL;
}

/* Forgets all but the first n messages. */
static void talk_forget(talk *t, int n) {
    while (t->n > n) free((char *)(uintptr_t)t->message[--t->n].content);
}

/* The bytes of an answer's text that stay as they are whatever follows: not U+FFFD at its end,
 * which stands for a character that is not yet whole, and not what may begin the text that ends the
 * answer. *ended: that text is there. */
static size_t talk_settled(const talk *t, const char *text, int more, int *ended) {
    size_t n = strlen(text), k = t->stop ? strlen(t->stop) : 0;
    const char *end = t->stop ? strstr(text, t->stop) : NULL;
    *ended = end != NULL;
    if (end) return (size_t)(end - text);
    while (more && n >= 3 && !memcmp(text + n - 3, "\xEF\xBF\xBD", 3)) n -= 3;
    for (; more && k; k--)
        if (k <= n && !memcmp(text + n - k, t->stop, k)) return n - k;
    return n;
}

/* Shows what is new of the answer. Returns its text so far, a block. */
static char *talk_show(talk *t, int more, int *ended) {
    const gen_item *it = &t->item;
    const char *lead = t->chat->lead;
    char *text = gen_text(t->tok, it->out, it->n - it->finished);
    size_t skip = lead && !strncmp(text, lead, strlen(lead)) ? strlen(lead) : 0;
    memmove(text, text + skip, strlen(text + skip) + 1);
    size_t n = talk_settled(t, text, more, ended);
    text[n] = 0;
    /* Where bytes that are no UTF-8 changed a text in hindsight, whole characters go on. */
    while (t->shown < n && ((unsigned char)text[t->shown] & 0xc0) == 0x80) t->shown++;
    if (t->shown < n) {
        serve_show(text + t->shown, n - t->shown);
        fflush(stdout);
        t->shown = n;
    }
    return text;
}

/* The progress hook: called after each token. */
static int talk_token(void *user, const rlhf_progress *p) {
    const cli *c = user;
    int ended;
    (void)p;
    mem_free(talk_show(c->talk, 1, &ended));
    return ended || cli_interrupted;
}

/* Finds out how this model is talked to, and begins with --system. */
static rlhf_status talk_open(talk *t) {
    const cli *c = t->c;
    API_ENTER(c->ctx);
    model_need_lm(t->m);
    t->chat = chat_choose(t->tok, c->v[O_chat_template] ? c->v[O_chat_template] : "auto");
    t->end = chat_end(t->tok, t->chat);
    const char *close = t->chat->close[CHAT_ASSISTANT];
    if (t->end < 0) t->stop = close ? close : t->chat->head[CHAT_USER];
    const chat_message first[] = {{"system", c->v[O_system]}, {"user", ""}};
    const char *bad = c->v[O_system] ? chat_check(t->chat, first, 2) : NULL;
    if (bad) err_throw(api_ctx, RLHF_ERR_ARG, "--system: %s: %s", t->chat->name, bad);
    if (c->v[O_system] && !talk_add(t, "system", c->v[O_system]))
        err_throw(api_ctx, RLHF_ERR_MEMORY, "out of memory");
    API_LEAVE();
}

/* Answers the conversation so far, on the screen and as a block. */
static rlhf_status talk_answer(talk *t, char **answer) {
    const rlhf_generate_config *c = &t->c->config.gen;
    API_ENTER(t->c->ctx);
    int room = base_min((int)c->max_new_tokens, t->m->c.positions), ended;
    tok_ids ids = {0};
    char *text = chat_render(t->tok, t->chat->name, t->message, t->n, 1, NULL, NULL);
    tok_encode(t->tok, text, strlen(text), !t->chat->close[CHAT_ASSISTANT], &ids);
    arena_reset(&t->m->ws);
    t->shown = 0;
    t->item = (gen_item){.prompt = ids.ids,
                         .n_prompt = ids.n,
                         .key = (uint64_t)t->answers,
                         .turn_end = t->end < 0 ? NULL : &t->end,
                         .out = arena_alloc(&t->m->ws, (size_t)room * sizeof(int32_t))};
    gen_config g = {.max_new = room,
                    .top_k = (int)c->top_k,
                    .batch = 1,
                    .temperature = (float)c->temperature,
                    .top_p = c->top_p,
                    .seed = (uint64_t)c->seed,
                    .stop = -1};
    gen_run(t->m, &t->m->ws, &g, &t->item, 1, "chat");
    /* What is left over where an answer was cut, half a character say, is none of it. */
    *answer = talk_show(t, !t->item.finished, &ended);
    t->item.finished |= ended;
    mem_free(ids.ids);
    mem_free(text);
    API_LEAVE();
}

/* One turn of the user and the answer to it. Returns an exit code, 0 to go on. */
static int talk_turn(talk *t, const char *line) {
    cli *c = t->c;
    int before = t->n;
    char *answer;
    if (!talk_add(t, "user", line)) return cli_fail(c, "out of memory");
    rlhf_status status = talk_answer(t, &answer);
    if (status) {
        cli_error(c, status);
        if (status != RLHF_ERR_CONTEXT || !isatty(0)) return 1;
        cli_fail(c, "the conversation is too long for the model: /reset begins a new one");
        talk_forget(t, before);
        return 0;
    }
    printf("\n");
    int added = talk_add(t, "assistant", answer);
    rlhf_free(c->ctx, answer);
    t->answers++;
    t->tokens += t->item.n;
    if (fflush(stdout)) return cli_fail(c, "standard output: %s", strerror(errno));
    if (!added) return cli_fail(c, "out of memory");
    if (cli_interrupted == SIGTERM) return 130;
    const char *why = cli_interrupted                                ? "stopped"
                      : t->item.finished                             ? NULL
                      : t->item.n == (int)c->config.gen.max_new_tokens ? "cut at --max_new_tokens"
                                                                     : "the model's positions end";
    if (why && !c->v[O_quiet]) fprintf(stderr, "rlhf: (%s)\n", why);
    return 0;
}

/* A signal while there is no answer to stop: nothing is left to save. */
static void talk_leave(int signal_number) {
    (void)signal_number;
    _exit(130);
}

/* Reads and answers until the input ends, /quit, or so many answers as `most` says, unless it is
 * negative. Returns an exit code. */
static int talk_run(talk *t, long long most) {
    cli *c = t->c;
    int code = 0, asks = isatty(0), begin = t->n;
    char *line = NULL;
    size_t cap = 0;
    c->talk = t;
    c->ctx->hooks.progress = talk_token;
    if (asks && !c->v[O_quiet])
        fprintf(stderr,
                "rlhf: chat template %s; /reset begins anew, /quit ends, Ctrl-C stops an answer\n",
                t->chat->name);
    while (!code && (most < 0 || t->answers < most)) {
        if (asks) printf("> ");
        fflush(stdout);
        cli_catch_signals(talk_leave);
        ssize_t n = getline(&line, &cap, stdin);
        if (n < 0) {
            if (asks) printf("\n");
            break;
        }
        cli_catch_signals(cli_on_signal);
        while (n && strchr("\r\n", line[n - 1])) line[--n] = 0;
        if (!strcmp(line, "/quit")) break;
        if (!strcmp(line, "/reset")) talk_forget(t, begin);
        else if (n) code = talk_turn(t, line);
    }
    free(line);
    talk_forget(t, 0);
    free(t->message);
    return code;
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 42 STAGE (cli_)
 * What commands share, and those that train: each opens what its options name, calls the public
 * functions of rlhf.h and prints what they found.
 * ============================================================================================ */

/* ---- shared by commands ---- */

#define CLI_TRY(call)                                                                              \
    do {                                                                                           \
        rlhf_status cli_status = (call);                                                           \
        if (cli_status != RLHF_OK) return cli_error(c, cli_status);                                \
    } while (0)

#define CLI_NEED(option)                                                                           \
    do {                                                                                           \
        if (!c->v[O_##option] || !*c->v[O_##option])                                               \
            return cli_fail(c, "%s: --%s %s is missing", c->cmd->name, #option,                    \
                            cli_options[O_##option].arg),                                          \
                   2;                                                                              \
    } while (0)

static int cli_number(cli *c, int option, long long lo, long long hi, long long *out) {
    char *end;
    if (!c->v[option]) return 0;
    *out = strtoll(c->v[option], &end, 10);
    if (*end || end == c->v[option] || *out < lo || *out > hi)
        return cli_fail(c, "--%s: \"%s\", expected an integer from %lld to %lld",
                        cli_options[option].name, c->v[option], lo, hi),
               2;
    return 0;
}

static rlhf_status cli_open_tokenizer(cli *c, rlhf_tokenizer **tok) {
    const char *dir = c->v[O_tokenizer] ? c->v[O_tokenizer] : c->v[O_model];
    return rlhf_tokenizer_open(c->ctx, dir, tok);
}

static rlhf_data_config cli_data_config(cli *c, rlhf_data_kind kind, int64_t max_length) {
    rlhf_data_config d = rlhf_data_config_default(kind);
    if (c->v[O_chat_template]) d.chat_template = c->v[O_chat_template];
    d.max_length = max_length > INT_MAX ? INT_MAX : (int)max_length;
    switch (c->cmd->config) {
    case RLHF_CONFIG_SFT: d.use_unqualified = c->config.sft.use_unqualified; break;
    case RLHF_CONFIG_RM:
        d.use_unqualified = c->config.rm.use_unqualified;
        d.aspect = c->config.rm.aspect;
        break;
    case RLHF_CONFIG_EVAL:
        d.use_unqualified = c->config.eval.use_unqualified;
        d.aspect = c->config.eval.aspect;
        break;
    default: break;
    }
    return d;
}

/* The longest record that a model takes, with room for an answer. */
static int64_t cli_fitting(rlhf_model *m, int64_t max_length, int64_t room) {
    int64_t fits = rlhf_model_get_shape(m).max_positions - room;
    return fits < max_length ? fits : max_length;
}

static void cli_set_hash(json_t *j, rlhf_model *m) {
    char hash[17];
    if (rlhf_model_hash(m, hash) == RLHF_OK)
        json_object_set_new(j, "weights_hash", json_string(hash));
}

/* Writes a text as a whole file, or leaves what is there. */
static rlhf_status cli_write_file(cli *c, const char *path, const char *text) {
    API_ENTER(c->ctx);
    io_write_file(c->ctx, path, text, strlen(text));
    API_LEAVE();
}

/* The same for a file in a directory. */
static rlhf_status cli_write_in(cli *c, const char *dir, const char *name, const char *text) {
    API_ENTER(c->ctx);
    io_write_file(c->ctx, ckpt_path(c->ctx, dir, name), text, strlen(text));
    API_LEAVE();
}

/* ---- training commands ---- */

/* What a run will take, as a table and (out not null) as an object of bytes. */
static void cli_show_memory(cli *c, const rlhf_trainer *t, json_t *out) {
    rlhf_memory m = rlhf_trainer_memory(t);
    const struct {
        const char *name;
        int64_t bytes;
    } row[] = {{"weights", m.weights},
               {"adapters", m.adapters},
               {"optimizer", m.optimizer},
               {"activations", m.activations},
               {"cache", m.cache},
               {"scratch", m.scratch},
               {"other", m.other},
               {"total", m.total}};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        if (!out && !c->v[O_quiet])
            fprintf(stderr, "rlhf: memory  %-12s %9.1f MB\n", row[i].name,
                    (double)row[i].bytes / 1e6);
        if (out) json_object_set_new(out, row[i].name, json_integer((json_int_t)row[i].bytes));
    }
}

/* Runs a trainer; *out becomes its last metrics. The run directory is told what the command was
 * given, in the options' names, so that `--config run.json` does the same again. */
static int cli_run_trainer(cli *c, rlhf_trainer *t, rlhf_model *m, rlhf_dataset *d, json_t **out) {
    static const int told[] = {O_model,  O_init, O_tokenizer, O_reward,
                               O_data,   O_eval_data, O_chat_template};
    c->about = t->about = json_object();
    for (size_t i = 0; i < sizeof told / sizeof *told; i++)
        if (c->v[told[i]])
            json_object_set_new(c->about, cli_options[told[i]].name, json_string(c->v[told[i]]));
    if (!c->v[O_quiet])
        fprintf(stderr, "rlhf: %d records, %lld tokens, %lld steps\n", rlhf_dataset_count(d),
                (long long)rlhf_dataset_tokens(d), (long long)rlhf_trainer_steps_total(t));
    cli_show_memory(c, t, NULL);
    rlhf_status status = rlhf_trainer_run(t);
    if (status == RLHF_STOPPED) {
        cli_fail(c, "interrupted at step %lld; the same command with --resume goes on from there",
                 (long long)rlhf_trainer_steps_done(t));
        return 130;
    }
    CLI_TRY(status);
    char *text = NULL;
    CLI_TRY(rlhf_trainer_metrics(t, &text));
    json_t *j = json_loads(text, 0, NULL);
    rlhf_free(c->ctx, text);
    json_object_set_new(j, "out", json_string(c->v[O_out]));
    json_object_set_new(j, "records", json_integer(rlhf_dataset_count(d)));
    json_object_set_new(j, "dropped", json_integer(rlhf_dataset_dropped(d)));
    cli_set_hash(j, m);
    if (c->v[O_json]) {
        json_t *memory = json_object();
        cli_show_memory(c, t, memory);
        json_object_set_new(j, "memory", memory);
    }
    *out = j;
    return 0;
}

/* One cell of a table, or with a null value the head of its column. A value with an interval takes
 * both bounds with it, whose own columns are left out. */
static void cli_print_cell(const char *column, const json_t *v, const json_t *row) {
    char name[64];
    size_t n = strlen(column);
    if ((n > 4 && !strcmp(column + n - 4, "_low")) || (n > 5 && !strcmp(column + n - 5, "_high")))
        return;
    snprintf(name, sizeof name, "%s_low", column);
    const json_t *low = json_object_get(row, name);
    snprintf(name, sizeof name, "%s_high", column);
    const json_t *high = json_object_get(row, name);
    if (!v) printf(low ? " %20.20s" : n > 12 ? " %15.15s" : " %12.12s", column);
    else if (low && json_is_number(low))
        printf("  %5.3g [%5.3g %5.3g]", json_number_value(v), json_number_value(low),
               json_number_value(high));
    else if (json_is_number(v))
        printf(low ? " %20.4g" : n > 12 ? " %15.4g" : " %12.5g", json_number_value(v));
    else printf(low ? " %20s" : n > 12 ? " %15s" : " %12s", "-");
}

/* Prints numbers and texts by name, then slices as tables. */
static void cli_print_object(cli *c, const json_t *j) {
    const char *key, *name;
    json_t *v, *slice;
    cli_clear(c);
    if (c->v[O_json]) return;
    json_object_foreach((json_t *)(uintptr_t)j, key, v) {
        if (json_is_integer(v)) printf("%-32s %lld\n", key, (long long)json_integer_value(v));
        else if (json_is_real(v)) printf("%-32s %.6g\n", key, json_real_value(v));
        else if (json_is_string(v)) printf("%-32s %s\n", key, json_string_value(v));
    }
    json_object_foreach((json_t *)(uintptr_t)j, key, v) {
        if (!json_is_object(v)) continue;
        const char *column;
        json_t *number, *first = json_object_iter_value(json_object_iter(v));
        printf("\n%-24s", key);
        json_object_foreach(first, column, number) cli_print_cell(column, NULL, first);
        printf("\n");
        json_object_foreach(v, name, slice) {
            printf("%-24s", name);
            json_object_foreach(slice, column, number) cli_print_cell(column, number, slice);
            printf("\n");
        }
    }
}

/* ---- dry run ---- */

enum { CLI_EXAMPLES = 3 }; /* shown by --dry_run */

/* The positions that config.json gives the model; its weights are not looked at. */
static rlhf_status cli_positions(cli *c, int64_t *positions) {
    API_ENTER(c->ctx);
    char *path = c->v[O_init] ? mem_strdup(c->ctx, c->v[O_init])
                              : io_join(c->ctx, c->v[O_model], "config.json");
    json_src src = json_source(c->ctx, path);
    json_t *config = json_read(&src);
    model_cfg cfg = {0};
    model_find_family(&src, config)->read(&src, config, &cfg);
    *positions = cfg.positions;
    mem_free(cfg.kinds);
    err_release(c->ctx);
    mem_free(path);
    API_LEAVE();
}

/* Prints a sequence as text, what bears loss in colour on a terminal and in [[ ]] elsewhere. A
 * token's text may depend on what precedes it, hence the texts of whole beginnings. */
static rlhf_status cli_show_seq(cli *c, rlhf_tokenizer *tok, const data_seq *s) {
    int colour = isatty(1) && !getenv("NO_COLOR");
    const char *on = colour ? "\033[32m" : "[[", *off = colour ? "\033[0m" : "]]";
    char *text, *part;
    size_t len, n, at = 0;
    rlhf_status status = rlhf_decode(tok, s->ids, s->n, 0, &text, &len);
    for (int t = 1; t <= s->n && !status; t++) {
        if (t < s->n && s->loss[t] == s->loss[t - 1]) continue;
        status = rlhf_decode(tok, s->ids, t, 0, &part, &n);
        if (status) break;
        /* A beginning that ends inside a character has another text there. */
        size_t same = 0;
        while (same < n && same < len && part[same] == text[same]) same++;
        while (same > at && same < len && ((unsigned char)text[same] & 0xc0) == 0x80) same--;
        rlhf_free(c->ctx, part);
        if (s->loss[t - 1]) printf("%s", on);
        serve_show(text + at, same - at);
        if (s->loss[t - 1]) printf("%s", off);
        at = same;
    }
    if (!status) rlhf_free(c->ctx, text);
    printf("\n");
    return status;
}

static int cli_loss_tokens(const data_seq *s) {
    int n = 0;
    for (int t = 0; t < s->n; t++) n += s->loss[t];
    return n;
}

/* Prints the first records of a dataset. */
static rlhf_status cli_show_examples(cli *c, rlhf_tokenizer *tok, const rlhf_dataset *d) {
    rlhf_status status = RLHF_OK;
    for (int i = 0; i < d->n && i < CLI_EXAMPLES; i++)
        for (int k = 0; k < 2 && !status; k++) {
            const data_seq *s = k ? &d->record[i].b : &d->record[i].a;
            if (!s->n) continue;
            printf("---- example %d%s: %d tokens, %d bear loss ----\n", i + 1,
                   d->config.kind != RLHF_DATA_PREFERENCE ? ""
                   : k                                    ? ", rejected"
                                                          : ", chosen",
                   s->n, cli_loss_tokens(s));
            status = cli_show_seq(c, tok, s);
        }
    return status;
}

/* What is known of a dataset, its names with the prefix. */
static void cli_describe(json_t *j, const char *prefix, const rlhf_dataset *d) {
    static const char *const whys[DATA_WHYS] = {"dropped_too_long", "dropped_labelled_false",
                                                "dropped_tied", "dropped_single",
                                                "dropped_unqualified", "dropped_other_aspect"};
    int64_t loss = 0, sequences = 0;
    int longest = 0;
    for (int i = 0; i < d->n; i++) {
        const data_record *rec = &d->record[i];
        loss += cli_loss_tokens(&rec->a) + cli_loss_tokens(&rec->b);
        sequences += 1 + (rec->b.n > 0);
        longest = base_max(longest, base_max(rec->a.n, rec->b.n));
    }
    const struct {
        const char *name;
        int64_t value;
    } rows[] = {{"records", d->n},
                {"dropped", d->dropped},
                {"tokens", d->tokens},
                {"tokens_with_loss", loss},
                {"mean_length", d->n ? d->tokens / sequences : 0},
                {"longest", longest},
                {"max_length", d->config.max_length}};
    char name[64];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        snprintf(name, sizeof name, "%s%s", prefix, rows[i].name);
        json_object_set_new(j, name, json_integer(rows[i].value));
    }
    for (int i = 0; i < DATA_WHYS; i++) {
        snprintf(name, sizeof name, "%s%s", prefix, whys[i]);
        if (d->why[i]) json_object_set_new(j, name, json_integer(d->why[i]));
    }
}

/* What a stage would read: examples, counts, and through cli_log what is dropped. Neither weights
 * nor trainers are made, nothing is written. room: positions that a prompt leaves to its answer. */
static int cli_dry_run(cli *c, rlhf_data_kind kind, int64_t max_length, int64_t room) {
    rlhf_tokenizer *tok;
    int64_t positions;
    CLI_TRY(cli_open_tokenizer(c, &tok));
    CLI_TRY(cli_positions(c, &positions));
    if (positions - room < max_length) max_length = positions - room;
    if (max_length < 1)
        return cli_fail(c, "the model's %d positions leave no room for a prompt", (int)positions);
    rlhf_data_config config = cli_data_config(c, kind, max_length);
    json_t *j = json_object();
    for (int i = 0; i < 2; i++) {
        const char *path = c->v[i ? O_eval_data : O_data];
        rlhf_dataset *d;
        if (!path) continue;
        CLI_TRY(rlhf_dataset_open(c->ctx, path, tok, &config, &d));
        if (i == 0 && !c->v[O_quiet]) CLI_TRY(cli_show_examples(c, tok, d));
        cli_describe(j, i ? "eval_" : "", d);
        rlhf_dataset_close(d);
    }
    cli_print_object(c, j);
    return cli_results(c, j);
}

/* ---- training ---- */

static int cli_sft(cli *c) {
    rlhf_sft_config *cfg = &c->config.sft;
    rlhf_model *m;
    rlhf_tokenizer *tok;
    rlhf_dataset *train, *eval = NULL;
    rlhf_trainer *t;
    if (!c->v[O_init]) CLI_NEED(model);
    else CLI_NEED(tokenizer);
    CLI_NEED(data);
    if (c->v[O_dry_run]) return cli_dry_run(c, RLHF_DATA_SFT, cfg->max_length, 0);
    if (!c->v[O_out] && cfg->output_dir[0]) c->v[O_out] = cfg->output_dir;
    CLI_NEED(out);
    cfg->output_dir = c->v[O_out];
    CLI_TRY(cli_open_tokenizer(c, &tok));
    if (c->v[O_init])
        CLI_TRY(rlhf_model_init(c->ctx, c->v[O_init], rlhf_tokenizer_vocab_size(tok),
                                rlhf_tokenizer_bos(tok), rlhf_tokenizer_eos(tok),
                                (uint64_t)cfg->seed, &m));
    else CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &m));
    rlhf_data_config d = cli_data_config(c, RLHF_DATA_SFT, cli_fitting(m, cfg->max_length, 0));
    CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_data], tok, &d, &train));
    if (c->v[O_eval_data]) CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_eval_data], tok, &d, &eval));
    CLI_TRY(rlhf_sft_open(m, tok, train, eval, cfg, &t));
    json_t *j = NULL;
    int code = cli_run_trainer(c, t, m, train, &j);
    if (code) return code;
    cli_print_object(c, j);
    return cli_results(c, j);
}

static int cli_rm(cli *c) {
    rlhf_rm_config *cfg = &c->config.rm;
    rlhf_model *start, *m;
    rlhf_tokenizer *tok;
    rlhf_dataset *train, *eval = NULL;
    rlhf_trainer *t;
    CLI_NEED(model);
    CLI_NEED(data);
    if (c->v[O_dry_run]) return cli_dry_run(c, RLHF_DATA_PREFERENCE, cfg->max_length, 0);
    if (!c->v[O_out] && cfg->output_dir[0]) c->v[O_out] = cfg->output_dir;
    CLI_NEED(out);
    cfg->output_dir = c->v[O_out];
    CLI_TRY(cli_open_tokenizer(c, &tok));
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &start));
    int scorer = rlhf_model_get_shape(start).head == RLHF_HEAD_SCORE;
    CLI_TRY(rlhf_model_clone(start, RLHF_HEAD_SCORE, &m));
    rlhf_data_config d =
        cli_data_config(c, RLHF_DATA_PREFERENCE, cli_fitting(m, cfg->max_length, 0));
    d.turns = cfg->per_turn;
    CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_data], tok, &d, &train));
    if (c->v[O_eval_data]) CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_eval_data], tok, &d, &eval));
    CLI_TRY(rlhf_rm_open(m, scorer ? NULL : start, tok, train, eval, cfg, &t));
    json_t *j = NULL;
    int code = cli_run_trainer(c, t, m, train, &j);
    if (code) return code;
    char *text;
    if (cfg->annotator_temperatures) {
        CLI_TRY(rlhf_rm_temperatures(t, &text));
        json_object_set_new(j, "annotator_temperatures", json_loads(text, 0, NULL));
        rlhf_free(c->ctx, text);
    }
    if (eval) {
        rlhf_eval_config by = {.slice = cfg->slice,
                               .per_turn = cfg->per_turn,
                               .aspect = cfg->aspect,
                               .use_unqualified = cfg->use_unqualified};
        CLI_TRY(rlhf_eval_pairs(m, eval, &by, &text));
        json_t *e = json_loads(text, 0, NULL), *v;
        CLI_TRY(cli_write_in(c, c->v[O_out], "eval.json", text));
        rlhf_free(c->ctx, text);
        const char *key;
        char name[64];
        /* Slices under their names; what is about the whole file joins the trainer's eval_*. */
        json_object_foreach(e, key, v) {
            snprintf(name, sizeof name, "eval_%s", key);
            if (json_is_object(v)) json_object_set(j, key, v);
            else if (!json_object_get(j, name)) json_object_set(j, name, v);
        }
        json_decref(e);
    }
    cli_print_object(c, j);
    return cli_results(c, j);
}

static int cli_ppo(cli *c) {
    rlhf_ppo_config *cfg = &c->config.ppo;
    rlhf_model *policy, *reward;
    rlhf_tokenizer *tok;
    rlhf_dataset *prompts;
    rlhf_trainer *t;
    CLI_NEED(model);
    CLI_NEED(data);
    if (c->v[O_dry_run])
        return cli_dry_run(c, RLHF_DATA_PROMPT, cfg->max_length, cfg->response_length);
    CLI_NEED(reward);
    if (!c->v[O_out] && cfg->output_dir[0]) c->v[O_out] = cfg->output_dir;
    CLI_NEED(out);
    cfg->output_dir = c->v[O_out];
    CLI_TRY(cli_open_tokenizer(c, &tok));
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &policy));
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_reward], &reward));
    if (cli_fitting(policy, cfg->max_length, cfg->response_length) < 1)
        return cli_fail(
            c, "--response_length %lld leaves no room for a prompt in the model's %d positions",
            (long long)cfg->response_length, rlhf_model_get_shape(policy).max_positions);
    rlhf_data_config d = cli_data_config(
        c, RLHF_DATA_PROMPT, cli_fitting(policy, cfg->max_length, cfg->response_length));
    CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_data], tok, &d, &prompts));
    CLI_TRY(rlhf_ppo_open(policy, tok, prompts, reward, NULL, NULL, cfg, &t));
    json_t *j = NULL;
    int code = cli_run_trainer(c, t, policy, prompts, &j);
    if (code) return code;
    cli_print_object(c, j);
    return cli_results(c, j);
}

#endif

#ifdef RLHF_MAIN

/* ============================================================================================
 * MARK: - 43 COMMAND (cli_ main)
 * The other commands. The table at the end is what main, --help and suggestions know.
 * ============================================================================================ */

static int cli_put_line(FILE *f, json_t *j) {
    char *text = json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(9));
    int bad = !text || fputs(text, f) == EOF || fputc('\n', f) == EOF;
    free(text);
    json_decref(j);
    return bad;
}

/* The stream that --out names, or standard output. */
static FILE *cli_out(cli *c) {
    if (!c->v[O_out]) return stdout;
    FILE *f = fopen(c->v[O_out], "wb");
    if (!f) cli_fail(c, "%s: cannot open: %s", c->v[O_out], strerror(errno));
    return f;
}

static int cli_close(cli *c, FILE *f) {
    int bad = fflush(f) != 0 || ferror(f);
    if (f != stdout) bad |= fclose(f) != 0;
    return bad ? cli_fail(c, "%s: cannot write: %s", c->v[O_out] ? c->v[O_out] : "standard output",
                          strerror(errno))
               : 0;
}

/* Lines of standard input, without their ends; *n becomes their number. */
static char **cli_read_lines(int *n, long long most) {
    char **lines = NULL, *line = NULL;
    size_t cap = 0;
    ssize_t len;
    *n = 0;
    while ((most < 0 || *n < most) && (len = getline(&line, &cap, stdin)) >= 0) {
        if (len && line[len - 1] == '\n') line[len - 1] = 0;
        char **grown = realloc(lines, (size_t)(*n + 1) * sizeof *lines);
        char *copy = strdup(line);
        if (!grown || !copy) break;
        lines = grown;
        lines[(*n)++] = copy;
    }
    free(line);
    return lines;
}

/* The samples of a file's prompts, as the records they came from with the completion added. */
static int cli_write_samples(cli *c, const rlhf_sample *s, int n) {
    FILE *f = cli_out(c);
    int bad = 0;
    if (!f) return 1;
    for (int i = 0; i < n; i++) {
        json_t *j = json_loads(s[i].record, JSON_ALLOW_NUL, NULL);
        json_object_set_new(j, "completion", json_string(s[i].completion));
        json_object_set_new(j, "n_tokens", json_integer(s[i].n_completion));
        json_object_set_new(j, "finished", json_boolean(s[i].finished));
        json_object_set_new(j, "logprob", json_real(s[i].logprob));
        bad |= cli_put_line(f, j);
    }
    return cli_close(c, f) || bad;
}

static int cli_generate(cli *c) {
    rlhf_model *m;
    rlhf_tokenizer *tok;
    rlhf_sample *s;
    int n = 0, count = 0;
    long long most = -1;
    CLI_NEED(model);
    int code = cli_number(c, O_max_steps, 0, INT_MAX, &most);
    if (code) return code;
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &m));
    CLI_TRY(cli_open_tokenizer(c, &tok));
    if (c->v[O_data]) {
        rlhf_dataset *d;
        rlhf_data_config cfg =
            cli_data_config(c, RLHF_DATA_PROMPT, rlhf_model_get_shape(m).max_positions - 1);
        cfg.max_records = (int)most;
        CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_data], tok, &cfg, &d));
        CLI_TRY(rlhf_generate_dataset(m, tok, &c->config.gen, d, &s, &count));
        code = cli_write_samples(c, s, count);
    } else {
        const char *one[1] = {c->v[O_prompt]};
        char **lines = c->v[O_prompt] ? NULL : cli_read_lines(&n, most);
        if (cli_interrupted) return 130;
        if (!c->v[O_prompt] && !n)
            return cli_fail(
                c,
                "generate: no prompt: give --prompt TEXT, --data FILE or lines on standard input");
        CLI_TRY(rlhf_generate(m, tok, &c->config.gen, lines ? (const char *const *)lines : one,
                              lines ? n : 1, &s, &count));
        cli_clear(c);
        for (int i = 0; i < count; i++) printf("%s\n", s[i].completion);
    }
    if (code) return code;
    double tokens = 0, finished = 0;
    for (int i = 0; i < count; i++) {
        tokens += s[i].n_completion;
        finished += s[i].finished;
    }
    json_t *j = json_pack("{s:i,s:f,s:f}", "samples", count, "mean_length", tokens / count,
                          "finished", finished / count);
    if (count == 1) json_object_set_new(j, "completion", json_string(s[0].completion));
    return cli_results(c, j);
}

static int cli_chat(cli *c) {
    talk t = {.c = c};
    long long most = -1;
    CLI_NEED(model);
    int code = cli_number(c, O_max_steps, 0, INT_MAX, &most);
    if (code) return code;
    if (c->config.gen.num_return_sequences > 1)
        return cli_fail(c, "--num_return_sequences: a conversation goes on from one answer"), 2;
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &t.m));
    CLI_TRY(cli_open_tokenizer(c, &t.tok));
    CLI_TRY(talk_open(&t));
    code = talk_run(&t, most);
    if (code) return code;
    return cli_results(c, json_pack("{s:I,s:I}", "turns", (json_int_t)t.answers, "tokens",
                                    (json_int_t)t.tokens));
}

static int cli_score(cli *c) {
    rlhf_model *m;
    rlhf_tokenizer *tok;
    rlhf_dataset *d;
    long long most = -1;
    CLI_NEED(model);
    CLI_NEED(data);
    int code = cli_number(c, O_max_steps, 0, INT_MAX, &most);
    if (code) return code;
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &m));
    CLI_TRY(cli_open_tokenizer(c, &tok));
    rlhf_data_config cfg =
        cli_data_config(c, RLHF_DATA_SCORE, rlhf_model_get_shape(m).max_positions);
    cfg.max_records = (int)most;
    CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_data], tok, &cfg, &d));
    int n = rlhf_dataset_count(d), bad = 0;
    float *score = calloc((size_t)n, sizeof *score);
    if (!score) return cli_fail(c, "out of memory");
    CLI_TRY(rlhf_score_dataset(m, d, score));
    FILE *f = cli_out(c);
    if (!f) return 1;
    double mean = 0, var = 0;
    for (int i = 0; i < n; i++) {
        json_t *j = json_loads(rlhf_dataset_record(d, i), JSON_ALLOW_NUL, NULL);
        json_object_set_new(j, "score", json_real((double)score[i]));
        bad |= cli_put_line(f, j);
        mean += (double)score[i] / n;
    }
    for (int i = 0; i < n; i++) var += ((double)score[i] - mean) * ((double)score[i] - mean) / n;
    code = cli_close(c, f) || bad;
    free(score);
    if (code) return code;
    return cli_results(c, json_pack("{s:i,s:i,s:f,s:f}", "records", n, "dropped",
                                    rlhf_dataset_dropped(d), "mean", mean, "std", sqrt(var)));
}

static int cli_eval(cli *c) {
    rlhf_model *m, *ref = NULL;
    rlhf_tokenizer *tok;
    rlhf_dataset *d;
    char *text;
    long long most = -1;
    CLI_NEED(model);
    CLI_NEED(data);
    int code = cli_number(c, O_max_steps, 0, INT_MAX, &most);
    if (code) return code;
    if (c->v[O_type] && !base_is_choice("text|preference", c->v[O_type]))
        return cli_fail(c, "--type: \"%s\", expected text or preference", c->v[O_type]), 2;
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &m));
    if (c->v[O_ref]) CLI_TRY(rlhf_model_open(c->ctx, c->v[O_ref], &ref));
    CLI_TRY(cli_open_tokenizer(c, &tok));
    int pairs = rlhf_model_get_shape(m).head == RLHF_HEAD_SCORE;
    if (c->v[O_type]) pairs = !strcmp(c->v[O_type], "preference");
    rlhf_data_config cfg = cli_data_config(c, pairs ? RLHF_DATA_PREFERENCE : RLHF_DATA_SFT,
                                           rlhf_model_get_shape(m).max_positions);
    cfg.max_records = (int)most;
    cfg.turns = c->config.eval.per_turn;
    CLI_TRY(rlhf_dataset_open(c->ctx, c->v[O_data], tok, &cfg, &d));
    if (pairs) CLI_TRY(rlhf_eval_pairs(m, d, &c->config.eval, &text));
    else CLI_TRY(rlhf_eval(m, d, ref, &text));
    json_t *j = json_loads(text, 0, NULL);
    rlhf_free(c->ctx, text);
    cli_print_object(c, j);
    return cli_results(c, j);
}

/* The groups of a report as tables, the whole first, and the most disputed items. What nothing is
 * known of has no column. */
static void cli_print_raters(cli *c, json_t *j) {
    static const char *const groups[] = {"domain", "annotator_type", "annotator", "prediction"};
    const char *name, *value;
    json_t *v, *row, *shown = json_object(), *all = json_object();
    size_t i;
    json_object_foreach(j, name, v) if (!json_is_object(v) && !json_is_array(v))
        json_object_set(all, name, v);
    json_object_foreach(j, name, v) {
        if (!json_is_null(v)) continue;
        json_object_del(all, name);
        for (i = 0; i < 3; i++)
            json_object_foreach(json_object_get(j, groups[i]), value, row)
                json_object_del(row, name);
    }
    const char *const counts[] = {"annotators",  "ties",         "skipped", "replaced",
                                  "unqualified", "other_aspect", "rounds"};
    for (i = 0; i < sizeof counts / sizeof *counts; i++) {
        json_object_set(shown, counts[i], json_object_get(j, counts[i]));
        json_object_del(all, counts[i]);
    }
    json_object_set_new(shown, "judgements of", json_pack("{s:o}", "all", all));
    for (i = 0; i < 4; i++)
        if (json_object_get(j, groups[i]))
            json_object_set(shown, groups[i], json_object_get(j, groups[i]));
    cli_print_object(c, shown);
    json_decref(shown);
    v = json_object_get(j, "disputed");
    if (json_array_size(v)) printf("\n%-24s %12s %12s\n", "disputed", "votes", "probability");
    json_array_foreach(json_object_get(j, "disputed"), i, v) {
        char *text = json_dumps(json_object_get(v, "prompt"), JSON_ENCODE_ANY);
        char *id = json_dumps(json_object_get(v, "item"), JSON_ENCODE_ANY);
        const json_t *n = json_object_get(v, "votes");
        char votes[48];
        snprintf(votes, sizeof votes, "%d:%d:%d", (int)json_integer_value(json_array_get(n, 0)),
                 (int)json_integer_value(json_array_get(n, 1)),
                 (int)json_integer_value(json_array_get(n, 2)));
        printf("%-24.24s %12s %12.3f  %.60s\n", id ? id : "", votes,
               json_number_value(json_object_get(v, "probability")), text ? text : "");
        free(text);
        free(id);
    }
}

static int cli_raters(cli *c) {
    rlhf_model *m = NULL;
    rlhf_tokenizer *tok = NULL;
    char *report, *labels;
    CLI_NEED(data);
    if (c->v[O_reward]) {
        CLI_TRY(rlhf_model_open(c->ctx, c->v[O_reward], &m));
        CLI_TRY(rlhf_tokenizer_open(c->ctx, c->v[O_tokenizer] ? c->v[O_tokenizer] : c->v[O_reward],
                                    &tok));
    }
    const char **paths = calloc((size_t)c->n_more + 1, sizeof *paths);
    if (!paths) return cli_fail(c, "out of memory");
    paths[0] = c->v[O_data];
    for (int i = 0; i < c->n_more; i++) paths[i + 1] = c->more[i];
    rlhf_status status = rlhf_raters(c->ctx, paths, c->n_more + 1, &c->config.raters, m, tok,
                                     &report, c->v[O_out] ? &labels : NULL);
    free(paths);
    CLI_TRY(status);
    if (c->v[O_out]) {
        CLI_TRY(cli_write_file(c, c->v[O_out], labels));
        rlhf_free(c->ctx, labels);
    }
    json_t *j = json_loads(report, 0, NULL);
    rlhf_free(c->ctx, report);
    if (!c->v[O_json]) cli_print_raters(c, j);
    return cli_results(c, j);
}

static rlhf_status cli_write_report(cli *c, int *warnings) {
    API_ENTER(c->ctx);
    report_write(c->ctx, (const char *const *)c->more, c->n_more, c->v[O_raters], c->v[O_out],
                 warnings);
    API_LEAVE();
}

static int cli_report(cli *c) {
    int warnings;
    if (!c->n_more)
        return cli_fail(c, "report: no run: give one or more directories that rlhf sft, rm or ppo "
                           "wrote"),
               2;
    CLI_NEED(out);
    CLI_TRY(cli_write_report(c, &warnings));
    json_t *j = json_pack("{s:s,s:i,s:i}", "out", c->v[O_out], "runs", c->n_more, "warnings",
                          warnings);
    cli_print_object(c, j);
    return cli_results(c, j);
}

static int cli_tokenize(cli *c) {
    rlhf_tokenizer *tok;
    int n, count, cap = 0;
    long long most = -1, total = 0;
    int32_t *ids = NULL;
    if (!c->v[O_tokenizer]) CLI_NEED(model);
    int code = cli_number(c, O_max_steps, 0, INT_MAX, &most);
    if (code) return code;
    CLI_TRY(cli_open_tokenizer(c, &tok));
    char **lines = cli_read_lines(&n, most);
    if (cli_interrupted) return 130;
    for (int i = 0; i < n; i++) {
        CLI_TRY(rlhf_encode(tok, lines[i], strlen(lines[i]), 1, ids, cap, &count));
        if (count > cap) {
            free(ids);
            cap = 2 * count;
            ids = malloc((size_t)cap * sizeof *ids);
            if (!ids) return cli_fail(c, "out of memory");
            CLI_TRY(rlhf_encode(tok, lines[i], strlen(lines[i]), 1, ids, cap, &count));
        }
        for (int k = 0; k < count; k++) printf("%s%d", k ? " " : "", (int)ids[k]);
        printf("\n");
        total += count;
    }
    return cli_results(c, json_pack("{s:i,s:I}", "lines", n, "tokens", (json_int_t)total));
}

/* Reads a file as it is, or unpacks it. */
static rlhf_status cli_read_file(cli *c, const char *path, char **text, size_t *len) {
    API_ENTER(c->ctx);
    *text = io_read(c->ctx, path, IO_LIMIT, len);
    API_LEAVE();
}

static int cli_tokenizer(cli *c) {
    rlhf_tokenizer *tok;
    long long size = 512;
    CLI_NEED(train);
    CLI_NEED(out);
    int code = cli_number(c, O_vocab_size, 257, 1 << 24, &size), n = c->n_more + 1;
    if (code) return code;
    char **text = calloc((size_t)n, sizeof *text);
    size_t *len = calloc((size_t)n, sizeof *len), total = 0;
    if (!text || !len) return cli_fail(c, "out of memory");
    for (int i = 0; i < n; i++) {
        CLI_TRY(cli_read_file(c, i ? c->more[i - 1] : c->v[O_train], text + i, len + i));
        total += len[i];
    }
    CLI_TRY(rlhf_tokenizer_train(c->ctx, (const char *const *)text, len, n, (int)size, &tok));
    CLI_TRY(rlhf_tokenizer_save(tok, c->v[O_out]));
    int vocab = rlhf_tokenizer_vocab_size(tok);
    if (!c->v[O_json])
        printf("%d entries learnt from %zu bytes, in %s\n", vocab, total, c->v[O_out]);
    free(text);
    free(len);
    return cli_results(c, json_pack("{s:i,s:I,s:s}", "vocab_size", vocab, "bytes",
                                    (json_int_t)total, "out", c->v[O_out]));
}

/* Writes an adapter and its base as one model directory. */
static rlhf_status cli_merge(cli *c, rlhf_model *m, rlhf_tokenizer *tok) {
    const char *dtype = c->v[O_save_dtype], *out = c->v[O_out];
    API_ENTER(c->ctx);
    if (!m->c.lora.r)
        err_throw(api_ctx, RLHF_ERR_ARG,
                  "%s: there is no adapter to merge (no adapter_config.json)", c->v[O_model]);
    char *taken = io_join(api_ctx, out, "adapter_config.json");
    if (io_exists(taken))
        err_throw(api_ctx, RLHF_ERR_ARG, "--out %s: holds an adapter; name another directory", out);
    mem_free(taken);
    model_thaw(m);
    ckpt_save(m, out, dtype && *dtype == 'b' ? 'b' : '4');
    tok_save(tok, out);
    API_LEAVE();
}

static int cli_export(cli *c) {
    rlhf_model *m;
    rlhf_tokenizer *tok;
    CLI_NEED(model);
    if (!c->v[O_gguf] && !c->v[O_merge])
        return cli_fail(c, "export: --gguf TYPE or --merge is missing"), 2;
    if (c->v[O_gguf] && c->v[O_merge])
        return cli_fail(c, "export: --gguf or --merge, not both (--gguf merges adapters, too)"), 2;
    CLI_NEED(out);
    if (c->v[O_gguf] && !base_is_choice(GGUF_KINDS, c->v[O_gguf]))
        return cli_fail(c, "--gguf: \"%s\", expected one of " GGUF_KINDS, c->v[O_gguf]), 2;
    if (c->v[O_gguf] && c->v[O_save_dtype])
        return cli_fail(c, "--save_dtype goes with --merge; --gguf itself names the type"), 2;
    if (c->v[O_save_dtype] && !base_is_choice("f32|bf16", c->v[O_save_dtype]))
        return cli_fail(c, "--save_dtype: \"%s\", expected f32 or bf16", c->v[O_save_dtype]), 2;
    CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &m));
    CLI_TRY(cli_open_tokenizer(c, &tok));
    if (c->v[O_merge]) CLI_TRY(cli_merge(c, m, tok));
    else CLI_TRY(rlhf_model_save_gguf(m, tok, c->v[O_out], c->v[O_gguf]));
    struct stat st = {0};
    json_t *j = json_pack("{s:s,s:I}", "out", c->v[O_out], "parameters",
                          (json_int_t)rlhf_model_get_shape(m).n_params);
    if (c->v[O_merge]) cli_set_hash(j, m);
    else if (!stat(c->v[O_out], &st))
        json_object_set_new(j, "bytes", json_integer((json_int_t)st.st_size));
    cli_print_object(c, j);
    return cli_results(c, j);
}

static int cli_info(cli *c) {
    char *text;
    CLI_TRY(rlhf_info(c->ctx, &text));
    json_t *j = json_loads(text, 0, NULL);
    rlhf_free(c->ctx, text);
    if (c->v[O_model]) {
        rlhf_model *m;
        CLI_TRY(rlhf_model_open(c->ctx, c->v[O_model], &m));
        rlhf_model_shape s = rlhf_model_get_shape(m);
        const struct {
            const char *name;
            json_int_t value;
        } rows[] = {{"vocab_size", s.vocab_size},
                    {"hidden_size", s.hidden_size},
                    {"num_hidden_layers", s.num_layers},
                    {"num_attention_heads", s.num_heads},
                    {"num_key_value_heads", s.num_kv_heads},
                    {"head_dim", s.head_dim},
                    {"intermediate_size", s.intermediate_size},
                    {"max_position_embeddings", s.max_positions},
                    {"parameters", s.n_params},
                    {"bytes", s.n_params * 4},
                    {"lora_r", s.lora_r},
                    {"adapter_parameters", s.n_adapter}};
        size_t n = sizeof rows / sizeof *rows - (s.lora_r ? 0 : 2);
        json_object_set_new(j, "model", json_string(c->v[O_model]));
        json_object_set_new(j, "model_type", json_string(s.model_type));
        json_object_set_new(j, "head", json_string(s.head == RLHF_HEAD_SCORE ? "score" : "lm"));
        json_object_set_new(j, "tied", json_boolean(s.tied));
        for (size_t i = 0; i < n; i++)
            json_object_set_new(j, rows[i].name, json_integer(rows[i].value));
        cli_set_hash(j, m);
    }
    cli_print_object(c, j);
    return cli_results(c, j);
}

/* The library's errors land here while the bench runs. */
static rlhf_status cli_bench_frame(cli *c, bench *b, const char *what) {
    API_ENTER(c->ctx);
    bench_run(b, what, c->v[O_model]);
    API_LEAVE();
}

static int cli_bench(cli *c) {
    static const char choices[] = "all|gemm|train|generate|ppo|growth";
    const char *what = c->n_more ? c->more[0] : "all";
    if (!base_is_choice(choices, what))
        return cli_fail(c, "bench: \"%s\", expected one of %s", what, choices), 2;
    bench *b = calloc(1, sizeof *b);
    if (!b) return cli_fail(c, "out of memory");
    char *text;
    CLI_TRY(rlhf_info(c->ctx, &text));
    json_t *machine = json_loads(text, 0, NULL);
    rlhf_free(c->ctx, text);
    b->ctx = c->ctx;
    b->quick = c->v[O_quick] != NULL;
    b->json = c->v[O_json] != NULL;
    if (!b->json)
        printf("%s, %s, %d threads, rlhf " RLHF_VERSION " (" RLHF_COMMIT "), compiler %s\n\n",
               json_string_value(json_object_get(machine, "cpu")), c->ctx->k->name, c->ctx->threads,
               __VERSION__);
    CLI_TRY(cli_bench_frame(c, b, what));
    json_t *list = json_array();
    for (int i = 0; i < b->n; i++)
        json_array_append_new(list,
                              json_pack("{s:s,s:f,s:s,s:f,s:f}", "name", b->list[i].name, "value",
                                        b->list[i].value, "unit", b->list[i].unit, "share",
                                        b->list[i].share, "peak_rss_mb", b->list[i].rss));
    char hash[17];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)b->hash);
    if (!b->json) printf("\nweights hash %s: equal hashes mean the same work\n", hash);
    json_object_set_new(machine, "compiler", json_string(__VERSION__));
    json_object_set_new(machine, "commit", json_string(RLHF_COMMIT));
    json_t *j = json_pack("{s:o,s:{s:f,s:f,s:f},s:o,s:s}", "machine", machine, "limits",
                          "fma_gflops", b->fma, "bf16_gflops", b->bf16, "dram_gbps", b->dram,
                          "results", list, "weights_hash", hash);
    free(b);
    return cli_results(c, j);
}

/* ---- labelling ---- */

/* Opens the models that answer prompts. */
static int cli_open_sampler(cli *c, label *l, label_sampler *m) {
    const label_config *cfg = l->c;
    rlhf_tokenizer *tok;
    m->fd = -1;
    m->done = json_object();
    m->dir[0] = c->v[O_model];
    m->dir[1] = *cfg->model2 ? cfg->model2 : NULL;
    CLI_TRY(cli_open_tokenizer(c, &tok));
    m->tok = tok;
    for (int i = 0; i < 2 && m->dir[i]; i++) {
        CLI_TRY(rlhf_model_open(c->ctx, m->dir[i], m->model + i));
        CLI_TRY(rlhf_model_hash(m->model[i], m->hash[i]));
    }
    int64_t room = cli_fitting(m->model[0], INT_MAX, cfg->max_new_tokens);
    if (m->model[1]) room = cli_fitting(m->model[1], room, cfg->max_new_tokens);
    if (room < 1)
        return cli_fail(c,
                        "--max_new_tokens %lld leaves no room for a prompt in a model's positions",
                        (long long)cfg->max_new_tokens);
    rlhf_data_config d = cli_data_config(c, RLHF_DATA_PROMPT, room);
    CLI_TRY(rlhf_dataset_open(c->ctx, cfg->prompts, tok, &d, &m->prompts));
    l->sampler = m;
    return 0;
}

/* Which round this is: that of the file's newest samples if they are of these models, else the
 * first, or with --continue the next one. */
static int cli_label_round(cli *c, label *l) {
    label_sampler *m = l->sampler;
    char key[64];
    int same = m->round > 0;
    for (int i = 0; i < 2 && m->model[i]; i++) {
        snprintf(key, sizeof key, "%d %s", m->round, m->hash[i]);
        same &= json_object_get(m->done, key) != NULL;
    }
    if (same) return 0;
    if (m->round && !c->v[O_continue])
        return cli_fail(c,
                        "%s: its answers are from other weights than %s; --continue adds a round "
                        "of these",
                        l->out, m->dir[0]);
    m->round++;
    return 0;
}

/* Samples until somebody has something to do. Returns an exit code. */
static int cli_label_more(void *user) {
    cli *c = ((void **)user)[0];
    label *l = ((void **)user)[1];
    while (l->sampler && l->sampler->next < l->sampler->prompts->n && !cli_interrupted &&
           label_pick(l, l->who, 0) < 0)
        CLI_TRY(label_sample(l));
    return cli_interrupted ? 130 : 0;
}

#ifndef RLHF_NO_HTTP

/* Serves until it is interrupted or, if asked, done; samples meanwhile. */
static int cli_label_serve(cli *c, label *l) {
    serve s = {0};
    char url[256];
    const char *bad = serve_open(&s, l);
    if (bad) return cli_fail(c, "%s", bad);
    for (int w = -1; w < l->n_whos; w++) {
        if (w >= 0 && !l->who[w].invited) continue;
        serve_link(&s, w < 0 ? l->operator_token : l->who[w].token, url, sizeof url);
        printf("%-20s %s\n", w < 0 ? "operator" : l->who[w].name, url);
    }
    fflush(stdout);
    c->serve = &s;
    int code = 0;
    while (!code && !s.failed && !cli_interrupted && !(l->c->exit_when_done && label_done(l))) {
        rlhf_status status = RLHF_OK;
        if (l->sampler && l->sampler->next < l->sampler->prompts->n) status = label_sample(l);
        else serve_poll(&s, 250);
        if (status && status != RLHF_STOPPED) code = cli_error(c, status);
    }
    c->serve = NULL;
    /* The last answer is still on its way. */
    for (int i = 0; i < 20 && !cli_interrupted; i++) serve_poll(&s, 5);
    serve_close(&s);
    if (cli_interrupted && !code) {
        cli_fail(c, "interrupted; the same command goes on from there");
        code = 130;
    }
    return s.failed ? 1 : code;
}

#endif

/* What label_open and the commands of the label need open; an exit code. */
static int cli_label_run(cli *c, label *l, label_sampler *m) {
    const label_config *cfg = l->c;
    rlhf_model *reward = NULL;
    rlhf_tokenizer *tok = NULL;
    int samples = *cfg->prompts && (strcmp(cfg->task, "write") || cfg->draft);
    l->fd = -1;
    CLI_NEED(out);
    if (!*cfg->prompts && !*cfg->pairs)
        return cli_fail(c, "label: --prompts FILE or --pairs FILE is missing"), 2;
    if (samples) CLI_NEED(model);
    int code = samples ? cli_open_sampler(c, l, m) : 0;
    if (code) return code;
    CLI_TRY(label_open(l));
    if (samples && (code = cli_label_round(c, l))) return code;
    if (c->v[O_reward]) {
        CLI_TRY(rlhf_model_open(c->ctx, c->v[O_reward], &reward));
        CLI_TRY(rlhf_tokenizer_open(c->ctx, c->v[O_reward], &tok));
        m->reward = reward;
        m->reward_tok = tok;
        m->chat_template = c->v[O_chat_template] ? c->v[O_chat_template] : "auto";
    }
    CLI_TRY(label_rank_items(l, 0, reward, tok, m->chat_template));
    if (cfg->tty) {
        const json_t *known = json_object_get(l->names, cfg->annotator);
        void *user[] = {c, l};
        if (!known || !l->who[json_integer_value(known)].invited)
            return cli_fail(c, "--annotator %s is not in %s", cfg->annotator, cfg->annotators);
        return serve_tty(l, (int)json_integer_value(known), cli_label_more, user);
    }
#ifdef RLHF_NO_HTTP
    return cli_fail(c, "this program is built without libmicrohttpd: only --tty works");
#else
    return cli_label_serve(c, l);
#endif
}

static int cli_label(cli *c) {
    label l = {.ctx = c->ctx, .c = &c->config.label, .out = c->v[O_out]};
    label_sampler m = {.fd = -1};
    int code = cli_label_run(c, &l, &m), finished = 0, total = 0;
    for (int i = 0; i < l.n_items; i++) {
        total += l.item[i].gold < 0;
        finished += l.item[i].gold < 0 && l.item[i].counted >= l.c->per_item;
    }
    json_t *j = json_pack("{s:s,s:i,s:i,s:i}", "out", l.out ? l.out : "", "items", total,
                          "finished", finished, "judgements", l.judgements);
    label_free(&l);
    if (!code) return cli_results(c, j);
    json_decref(j);
    return code;
}

/* ---- main ---- */

static const cli_command cli_commands[] = {
    {"sft", "supervised fine-tuning", "--model DIR --data train.jsonl --out DIR",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(init) | CLI_BIT(tokenizer) | CLI_BIT(data) |
         CLI_BIT(eval_data) | CLI_BIT(out) | CLI_BIT(chat_template) | CLI_BIT(dry_run),
     RLHF_CONFIG_SFT, cli_sft},
    {"rm", "train a reward model on preferences", "--model SFT_DIR --data prefs.jsonl --out DIR",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(data) | CLI_BIT(eval_data) |
         CLI_BIT(out) | CLI_BIT(chat_template) | CLI_BIT(dry_run),
     RLHF_CONFIG_RM, cli_rm},
    {"ppo", "proximal policy optimisation against a reward model",
     "--model SFT_DIR --reward RM_DIR --data prompts.jsonl --out DIR",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(reward) | CLI_BIT(data) |
         CLI_BIT(out) | CLI_BIT(chat_template) | CLI_BIT(dry_run),
     RLHF_CONFIG_PPO, cli_ppo},
    {"generate", "continue prompts",
     "--model DIR [--prompt TEXT | --data prompts.jsonl --out answers.jsonl]",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(prompt) | CLI_BIT(data) |
         CLI_BIT(out) | CLI_BIT(chat_template),
     RLHF_CONFIG_GENERATE, cli_generate},
    {"chat", "a conversation: a line of standard input is a turn; /reset, /quit",
     "--model DIR [--system TEXT] [--max_new_tokens N]",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(system) | CLI_BIT(chat_template),
     RLHF_CONFIG_GENERATE, cli_chat},
    {"score", "the reward of each record",
     "--model RM_DIR --data answers.jsonl [--out scored.jsonl]",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(data) | CLI_BIT(out) |
         CLI_BIT(chat_template),
     -1, cli_score},
    {"eval", "likelihood, KL or preference accuracy on a file",
     "--model DIR --data FILE [--ref DIR]",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(data) | CLI_BIT(ref) |
         CLI_BIT(type) | CLI_BIT(chat_template),
     RLHF_CONFIG_EVAL, cli_eval},
    {"raters", "annotators: agreement, reliability, labels that trust the reliable",
     "--data prefs.jsonl [FILE...] [--reward RM_DIR] [--out labels.jsonl]",
     CLI_COMMON | CLI_BIT(tokenizer) | CLI_BIT(reward) | CLI_BIT(data) | CLI_BIT(out),
     RLHF_CONFIG_RATERS, cli_raters},
    {"label", "collect judgements and texts of people, in their browsers or a terminal",
     "--model DIR --prompts FILE --out prefs.jsonl | --pairs FILE --out prefs.jsonl",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(reward) | CLI_BIT(out) |
         CLI_BIT(chat_template) | CLI_BIT(continue),
     CLI_LABEL, cli_label},
    {"report", "runs as one page for a browser: curves, slices, answers, warnings",
     "RUN... --out report.html [--raters FILE]",
     CLI_COMMON | CLI_BIT(raters) | CLI_BIT(out), -1, cli_report},
    {"export", "a file for llama.cpp, or an adapter merged into its base",
     "--model DIR [--gguf TYPE --out FILE.gguf | --merge --out DIR]",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer) | CLI_BIT(gguf) | CLI_BIT(merge) |
         CLI_BIT(save_dtype) | CLI_BIT(out),
     -1, cli_export},
    {"tokenize", "lines of standard input to token ids", "--tokenizer DIR < text",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(tokenizer), -1, cli_tokenize},
    {"tokenizer", "learn a byte-level BPE vocabulary from text",
     "--train FILE... --vocab_size N --out DIR",
     CLI_COMMON | CLI_BIT(train) | CLI_BIT(vocab_size) | CLI_BIT(out), -1, cli_tokenizer},
    {"bench", "this machine's speed at the work of RLHF",
     "[all|gemm|train|generate|ppo|growth] [--model NAME|DIR]",
     CLI_COMMON | CLI_BIT(model) | CLI_BIT(quick), -1, cli_bench},
    {"info", "this machine, and a model's shape", "[--model DIR]", CLI_COMMON | CLI_BIT(model), -1,
     cli_info}};
enum { CLI_COMMANDS = sizeof cli_commands / sizeof *cli_commands };

static int cli_usage(FILE *f) {
    fprintf(f,
            "rlhf " RLHF_VERSION " - supervised fine-tuning, reward models and PPO on a CPU\n\n");
    for (int i = 0; i < CLI_COMMANDS; i++)
        fprintf(f, "  rlhf %-10s %s\n", cli_commands[i].name, cli_commands[i].what);
    fprintf(f, "\n`rlhf COMMAND --help` lists a command's options.\n");
    return f == stderr ? 2 : 0;
}

/* Opens the context that the options ask for. */
static int cli_open(cli *c) {
    rlhf_options o = rlhf_options_default();
    long long threads = 0;
    int code = cli_number(c, O_threads, 1, RLHF_MAX_THREADS, &threads);
    if (code) return code;
    o.threads = (int)threads;
    o.isa = c->v[O_isa] ? c->v[O_isa] : "auto";
    o.dtype = c->v[O_dtype] ? c->v[O_dtype] : "f32";
    if (!base_is_choice("f32|bf16", o.dtype))
        return cli_fail(c, "--dtype: \"%s\", expected f32 or bf16", o.dtype), 2;
    o.hooks = (rlhf_hooks){.user = c, .log = cli_log, .progress = cli_progress};
    rlhf_status status = rlhf_open(&c->ctx, &o);
    if (status == RLHF_ERR_ARG)
        return cli_fail(c, "--isa: \"%s\", this processor has: auto %s", o.isa, rlhf_isas()), 2;
    return status ? cli_fail(c, "%s", rlhf_status_text(status)) : 0;
}

int main(int argc, char **argv) {
    cli c = {0};
#ifdef __GLIBC__
    /* A large array that is given back goes back to the system. Left alone, the C library begins to
     * keep those of up to 32 MB once it has seen one, beside what a run asks for next. */
    mallopt(M_MMAP_THRESHOLD, 4 << 20);
#endif
    if (argc < 2) return cli_usage(stderr);
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "help") || !strcmp(argv[1], "-h"))
        return cli_usage(stdout);
    if (!strcmp(argv[1], "--version")) return printf("rlhf " RLHF_VERSION "\n") < 0;
    const char *near = NULL;
    for (int i = 0, least = 4; i < CLI_COMMANDS && !c.cmd; i++) {
        int d = cli_distance(argv[1], cli_commands[i].name);
        if (d == 0) c.cmd = cli_commands + i;
        if (d < least) least = d, near = cli_commands[i].name;
    }
    if (!c.cmd) {
        fprintf(stderr, "rlhf: unknown command \"%s\"; %s%s%s\n", argv[1],
                near ? "did you mean \"" : "`rlhf --help` lists them", near ? near : "",
                near ? "\"?" : "");
        return 2;
    }
    int n_fields;
    const rlhf_field *fields = cli_fields(c.cmd, &n_fields);
    train_fill(fields, n_fields, &c.config);
    int code = cli_parse(&c, argc - 2, argv + 2);
    if (c.v[O_help]) {
        cli_help(c.cmd);
        return 0;
    }
    c.tty = isatty(2);
    if (!code) code = cli_open(&c);
    if (code) return code;
    cli_catch_signals(cli_on_signal);
    code = c.cmd->run(&c);
    rlhf_close(c.ctx);
    json_decref(c.file);
    json_decref(c.about);
    return code;
}

#endif
