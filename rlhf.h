/* rlhf.h - supervised fine-tuning, reward models and PPO on an ordinary CPU, in one C file.
 *
 * Five nouns: rlhf_ctx (threads, memory, log, last error), rlhf_tokenizer, rlhf_dataset,
 * rlhf_model, rlhf_trainer. They are opaque; every object belongs to the context it was made with
 * and is closed before it.
 *
 * Every function that can fail returns rlhf_status; the text is in rlhf_error(ctx). The library
 * never exits, prints or reads the environment. There are no process-wide variables: contexts on
 * different threads are independent, one context is used by one thread at a time (the library
 * starts its own worker threads inside a call).
 *
 * Results are the same bits for any number of threads, any grouping into batches and, in f32, any
 * instruction set and any cut of a step into micro-batches.
 *
 * Embedding: put rlhf.c and rlhf.h into a project, compile rlhf.c with -ffp-contract=off (and
 * -fopenmp for threads), link jansson, pcre2-8, utf8proc, zlib and libm. test/example_ppo.c is a
 * complete program.
 */
#ifndef RLHF_H
#define RLHF_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RLHF_VERSION "0.1.0"

/* ---- Status ---- */

#define RLHF_STATUS_LIST(X)                                                                        \
    X(RLHF_OK, "ok")                                                                               \
    X(RLHF_ERR_ARG, "bad argument")            /* a parameter out of range, a null pointer */      \
    X(RLHF_ERR_MEMORY, "out of memory")        /* the hook gave null, or a size overflows */       \
    X(RLHF_ERR_IO, "input/output error")       /* a file cannot be opened, read, written */        \
    X(RLHF_ERR_FORMAT, "bad file")             /* a file whose contents make no sense */           \
    X(RLHF_ERR_DATA, "bad record")             /* a dataset record that cannot be used */          \
    X(RLHF_ERR_UNSUPPORTED, "not supported")   /* well-formed, but not computed here */            \
    X(RLHF_ERR_CONTEXT, "context overflow")    /* more tokens than the model has places */         \
    X(RLHF_ERR_NUMERIC, "not a finite number") /* a loss or gradient; no step is taken */          \
    X(RLHF_ERR_CALLBACK, "callback failed")    /* a reward function returned an error */           \
    X(RLHF_STOPPED, "stopped")                 /* the progress hook asked to; state is kept */

/* RLHF_OK is 0; every other value is a failure, or the wish to stop. */
typedef enum rlhf_status {
#define RLHF_STATUS_ENUM_(name, text) name,
    RLHF_STATUS_LIST(RLHF_STATUS_ENUM_)
#undef RLHF_STATUS_ENUM_
} rlhf_status;

/* The short text of a status; static, never null, also for a value that is no status. */
const char *rlhf_status_text(rlhf_status status);

/* ---- Context ---- */

/* The five nouns. Datasets copy what they need of a tokenizer; trainers point at all that they are
 * given. Closing a context closes what is left of the others. */
typedef struct rlhf_ctx rlhf_ctx;
typedef struct rlhf_tokenizer rlhf_tokenizer;
typedef struct rlhf_dataset rlhf_dataset;
typedef struct rlhf_model rlhf_model;
typedef struct rlhf_trainer rlhf_trainer;

/* How much a message matters; warnings tell of data that were left out or choices that were
 * ignored, debug messages of each record that was. */
typedef enum rlhf_level { RLHF_LOG_DEBUG, RLHF_LOG_INFO, RLHF_LOG_WARNING } rlhf_level;

/* Where a long call stands. done and total count steps (trainers) or samples (generation); tokens
 * counts tokens processed so far. Valid during the hook's call only. */
typedef struct rlhf_progress {
    const char *what; /* "sft", "rm", "ppo" or "generate" */
    int64_t done, total, tokens;
    double seconds;      /* since the call or the trainer began */
    const char *metrics; /* one JSON object with the newest metrics, or null between log points */
} rlhf_progress;

/* Every hook may be null; alloc and free are given both or neither. alloc returns memory aligned
 * for any type or null; free gets the size that was asked for. log gets one message without a
 * newline. progress returns non-zero to stop: the call ends with RLHF_STOPPED at the next safe
 * point. Hooks run on the calling thread, inside the call; they must not jump out of it, and alloc,
 * free and log must not call the library with the same context. */
typedef struct rlhf_hooks {
    void *user;
    void *(*alloc)(void *user, size_t size);
    void (*free)(void *user, void *ptr, size_t size);
    void (*log)(void *user, rlhf_level level, const char *text);
    int (*progress)(void *user, const rlhf_progress *progress);
} rlhf_hooks;

/* What a context is opened with; fill it with rlhf_options_default and change what matters. */
typedef struct rlhf_options {
    int threads;     /* worker threads; 0: processors, or a container's share of their time */
    const char *isa; /* kernels: "auto" or one of rlhf_isas(); with f32 the bits are the same */
    /* "f32", or "bf16": matrix products of models multiply numbers rounded to bfloat16, to which
     * keys and values of attention are rounded, too; caches keep these in half of the memory.
     * Weights, sums, gradients and statistics stay f32. Results are then the same bits for any
     * threads and batches, not on every isa. Null: "f32". */
    const char *dtype;
    rlhf_hooks hooks;
} rlhf_options;

/* All processors, the best kernels, no hooks. */
rlhf_options rlhf_options_default(void);

/* Opens a context; options may be null for the defaults. RLHF_ERR_ARG for an unknown or unavailable
 * isa, for a thread count that is negative or beyond 1024, and for one of alloc and free without
 * the other, else RLHF_ERR_MEMORY. *ctx is then null. */
rlhf_status rlhf_open(rlhf_ctx **ctx, const rlhf_options *options);

/* Closes a context, after its objects; null is allowed. Memory of objects still open goes, too,
 * their handles are then dead. */
void rlhf_close(rlhf_ctx *ctx);

/* The text of the last error in this context ("prefs.jsonl:17: missing \"chosen\""); "" if there
 * was none. Valid until the next call with this context. A call refused for a null argument leaves
 * the text as it was. */
const char *rlhf_error(const rlhf_ctx *ctx);

/* The kernel sets this processor can run, space-separated, best first ("avx2 ref"). */
const char *rlhf_isas(void);

/* One JSON object about this machine and context: version, cpu, isa, available, threads,
 * processors. The text is released with rlhf_free. */
rlhf_status rlhf_info(rlhf_ctx *ctx, char **json);

/* Releases a text that the library returned, of any context. Null is allowed. */
void rlhf_free(rlhf_ctx *ctx, void *ptr);

/* ---- Tokenizer ---- */

/* Reads DIR/tokenizer.json (and tokenizer_config.json, special tokens, chat template where
 * present), or a tokenizer.json given by its path. RLHF_ERR_IO, RLHF_ERR_FORMAT, or
 * RLHF_ERR_UNSUPPORTED for a kind of tokenizer or step that is not known here; *tokenizer is then
 * null. */
rlhf_status rlhf_tokenizer_open(rlhf_ctx *ctx, const char *path, rlhf_tokenizer **tokenizer);

/* Null is allowed. After the trainers that use it. */
void rlhf_tokenizer_close(rlhf_tokenizer *tokenizer);

/* Trains a byte-level BPE (Sennrich et al. 2016) with vocab_size entries (at least 257: 256 bytes
 * and "<|endoftext|>") on n texts of lens[i] bytes. The most frequent pair is merged first; among
 * equals the one with the smaller pair of ids. A pair that occurs once is not merged: a small text
 * may give fewer entries. RLHF_ERR_ARG for a vocab_size out of range. */
rlhf_status rlhf_tokenizer_train(rlhf_ctx *ctx, const char *const *texts, const size_t *lens, int n,
                                 int vocab_size, rlhf_tokenizer **tokenizer);

/* Writes DIR/tokenizer.json and DIR/tokenizer_config.json, which Hugging Face's library reads to
 * the same effect. */
rlhf_status rlhf_tokenizer_save(rlhf_tokenizer *tokenizer, const char *dir);

/* Ids are below this number; a model may have more rows, never fewer. */
int rlhf_tokenizer_vocab_size(const rlhf_tokenizer *tokenizer);
int rlhf_tokenizer_eos(const rlhf_tokenizer *tokenizer); /* the end-of-text id, -1 if there is none
                                                          */
int rlhf_tokenizer_bos(const rlhf_tokenizer *tokenizer); /* the beginning-of-text id, -1 if there is
                                                            none */

/* Encodes len bytes of UTF-8 text. *n becomes the number of tokens; the first min(*n, cap) of them
 * are written to ids, so that a call with cap 0 measures (ids may then be null). add_special: also
 * what the tokenizer's post-processor adds (a beginning-of-text token). Special tokens written out
 * in the text are recognised. Bytes that are not UTF-8 count as U+FFFD. */
rlhf_status rlhf_encode(rlhf_tokenizer *tokenizer, const char *text, size_t len, int add_special,
                        int32_t *ids, int cap, int *n);

/* Decodes n ids to a NUL-terminated text (released with rlhf_free); *len, if not null, becomes its
 * length in bytes. skip_special leaves out special tokens. RLHF_ERR_ARG for an id that is negative
 * or not below rlhf_tokenizer_vocab_size. Ids in the middle of a character decode to U+FFFD. */
rlhf_status rlhf_decode(rlhf_tokenizer *tokenizer, const int32_t *ids, int n, int skip_special,
                        char **text, size_t *len);

/* ---- Dataset ---- */

/* What a record is read as. Its form may be any of these, turns being lists of {"role", "content"}
 * or of {"from", "value"}:
 *     text
 *     messages, or conversations
 *     prompt + completion (or response, output, answer), texts or turns, with or without a label
 *     instruction (+ input, system, history) + output
 *     chosen + rejected, texts or turns, with or without prompt, or after conversations
 *     prompt + responses[] + ranking[] (1 is the best, equal ones are ties), or best (an index)
 */
typedef enum rlhf_data_kind {
    RLHF_DATA_SFT,        /* one text or conversation; of several answers the best one; what is
                             labelled false is dropped */
    RLHF_DATA_PREFERENCE, /* pairs; all those of a ranking, and of answers to one prompt that are
                             labelled true and false, share one weight; an answer without
                             counterpart is dropped */
    RLHF_DATA_PROMPT,     /* what precedes the last answer; further members of a record with a
                             prompt go to the reward function */
    RLHF_DATA_SCORE       /* one whole answer, to be scored or evaluated */
} rlhf_data_kind;

/* How records become tokens. A trainer wants its kind: SFT, PREFERENCE (reward model), PROMPT
 * (PPO). */
typedef struct rlhf_data_config {
    rlhf_data_kind kind;
    int max_length;  /* tokens in a record; longer ones are dropped and counted, never cut */
    int max_records; /* stop after so many usable records; -1 = all */
    int completion_only_loss; /* 1: the prompt bears no loss (prompt + completion records) */
    int add_eos; /* 1: an end-of-text token follows every text or answer that lacks one */
    const char *chat_template; /* "auto" (from the tokenizer), or one of rlhf_chat_templates() */
    int turns; /* 1: keep where each turn of the assistant ends, for per_turn evaluation */
    const char *aspect; /* PREFERENCE: the choice that counts is the one on this of a record's
                           "aspects", records without it are dropped; "" or null: the overall one */
    int use_unqualified; /* PREFERENCE, SFT: 0 drops what is marked "qualified": false */
} rlhf_data_config;

/* max_length 1024, all records, completion_only_loss 1, add_eos 1, chat_template "auto", no aspect,
 * use_unqualified 0. */
rlhf_data_config rlhf_data_config_default(rlhf_data_kind kind);

/* The names of the chat templates, separated by '|'; static. */
const char *rlhf_chat_templates(void);

/* Reads a .jsonl file (plain or gzip), one record a line, or a JSON array. A record that cannot be
 * used is RLHF_ERR_DATA with file:line, as is a file without a usable record; one that is too long,
 * or of no use to the kind, is dropped and counted, and the log says why. The dataset keeps no
 * pointer to the tokenizer. */
rlhf_status rlhf_dataset_open(rlhf_ctx *ctx, const char *path, rlhf_tokenizer *tokenizer,
                              const rlhf_data_config *config, rlhf_dataset **dataset);

/* The same from len bytes of JSON lines in memory; name stands for the file in messages. */
rlhf_status rlhf_dataset_parse(rlhf_ctx *ctx, const char *jsonl, size_t len, const char *name,
                               rlhf_tokenizer *tokenizer, const rlhf_data_config *config,
                               rlhf_dataset **dataset);

/* Null is allowed. After the trainers that use it. */
void rlhf_dataset_close(rlhf_dataset *dataset);
int rlhf_dataset_count(const rlhf_dataset *dataset);      /* usable records */
int rlhf_dataset_dropped(const rlhf_dataset *dataset);    /* too long, or of no use to the kind */
int64_t rlhf_dataset_tokens(const rlhf_dataset *dataset); /* in all usable records */

/* Record i as it was read: one line of JSON, valid until the dataset is closed; null if i is out of
 * range. */
const char *rlhf_dataset_record(const rlhf_dataset *dataset, int i);

/* ---- Model ---- */

/* What the last layer feeds: the vocabulary, or one score. */
typedef enum rlhf_head { RLHF_HEAD_LM, RLHF_HEAD_SCORE } rlhf_head;

/* Sizes as Hugging Face's config.json names them. */
typedef struct rlhf_model_shape {
    const char *model_type; /* "gpt2", "llama" */
    rlhf_head head;
    int vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size,
        max_positions;
    int tied;         /* the output matrix is the embedding */
    int64_t n_params; /* weights, those of its adapter included */
    int lora_r;       /* rank of its adapter; 0: none */
    int64_t n_adapter; /* weights of the adapter and, with one, of the score head */
} rlhf_model_shape;

/* Opens a Hugging Face directory: config.json, model.safetensors or the files of its index (f32,
 * f16, bf16; computed in f32), generation_config.json if present; or an adapter in PEFT's layout
 * (adapter_config.json, adapter_model.safetensors) and the directory of its base. Matrices stay in
 * the files, mapped, or take their place in memory once they are used, where that is no more than
 * half of the machine's; they are shared by all models that are opened from the same files, until a
 * trainer makes them floats of its model's own. The files must not be written to meanwhile (to be
 * replaced by others is fine). RLHF_ERR_IO for a file that is missing, RLHF_ERR_FORMAT for tensors
 * that do not fit config.json, RLHF_ERR_UNSUPPORTED for a model_type or option not computed here;
 * *model is then null. */
rlhf_status rlhf_model_open(rlhf_ctx *ctx, const char *dir, rlhf_model **model);

/* A new model with random weights from the config.json at the path config_json. vocab_size > 0
 * replaces the one in the file; eos and bos ids likewise if >= 0. The same seed gives the same
 * bits. */
rlhf_status rlhf_model_init(rlhf_ctx *ctx, const char *config_json, int vocab_size, int bos,
                            int eos, uint64_t seed, rlhf_model **model);

/* A copy: training one changes nothing of the other, weights that nobody trains are shared. head
 * RLHF_HEAD_SCORE turns a language model into a scorer whose head is not yet trained (or keeps a
 * scorer's head); scoring with an untrained head is refused. */
rlhf_status rlhf_model_clone(rlhf_model *model, rlhf_head head, rlhf_model **copy);

/* Writes DIR/config.json, model.safetensors, generation_config.json and, if tokenizer is not null,
 * its files. A tensor is written in the dtype it was read in if no digit is lost, so that unchanged
 * ones are the same bytes again, else as f32. Each file is written beside its place and renamed, so
 * that a reader never sees half of one. */
rlhf_status rlhf_model_save(rlhf_model *model, rlhf_tokenizer *tokenizer, const char *dir);

/* Makes adapters part of the weights, which all become the model's own floats, so that it is saved
 * as a whole model. Nothing changes in a model that has its own weights already. After the trainers
 * that use it. On failure the model is as it was. */
rlhf_status rlhf_model_merge(rlhf_model *model);

/* Writes a language model and its tokenizer as one GGUF file, which llama.cpp loads; beside its
 * place and renamed, too. type, how matrices are stored: "f32", "f16", "bf16" or "q8_0". tokenizer
 * may be null: such a file takes and gives token ids only. RLHF_ERR_UNSUPPORTED for a model or
 * tokenizer that llama.cpp would compute in another way, RLHF_ERR_NUMERIC for a weight beyond the
 * type's range. */
rlhf_status rlhf_model_save_gguf(rlhf_model *model, rlhf_tokenizer *tokenizer, const char *path,
                                 const char *type);

/* Null is allowed. After the trainers that use it. */
void rlhf_model_close(rlhf_model *model);

/* The sizes of a model; all zero for null. Its texts live as long as the library. */
rlhf_model_shape rlhf_model_get_shape(const rlhf_model *model);

/* A 64-bit hash of all weights, as 16 hexadecimal digits and a NUL: equal work gives equal hashes.
 */
rlhf_status rlhf_model_hash(rlhf_model *model, char hash[17]);

/* Logits [n][vocab_size] of one token sequence, before the softmax; row t is about token t + 1. n
 * >= 1. RLHF_ERR_ARG for a reward model or an id not below vocab_size, RLHF_ERR_CONTEXT for n
 * beyond max_positions; the same for the next two. */
rlhf_status rlhf_model_logits(rlhf_model *model, const int32_t *ids, int n, float *logits);

/* logprobs[t] = log p(ids[t+1] | ids[0..t]), t < n-1, in nats, at temperature 1. n >= 2. */
rlhf_status rlhf_model_logprobs(rlhf_model *model, const int32_t *ids, int n, float *logprobs);

/* The normalised reward at the last token of one sequence, prompt and answer. RLHF_ERR_ARG for a
 * language model or a score head that was never trained. */
rlhf_status rlhf_model_score(rlhf_model *model, const int32_t *ids, int n, float *score);

/* ---- Configurations ---- */

/* One table per configuration. Each row F(kind, name, default, min, max, help) makes the struct
 * member, its default, its range, the command line option, the line in --help and the entry in the
 * run's config file. Kinds: I integer, R real, B boolean, S text (min = allowed values separated by
 * '|', or null). Names are those of TRL where TRL has them. */

#define RLHF_TRAIN_FIELDS(F, LR, EPOCHS, BATCH, LOGGING)                                           \
    F(R, learning_rate, LR, 0, 1e3, "peak learning rate of AdamW")                                 \
    F(S, lr_scheduler_type, "linear", "linear|cosine|constant", 0,                                 \
      "how the learning rate falls after warm-up")                                                 \
    F(I, warmup_steps, 0, 0, 1e9, "steps of linear warm-up")                                       \
    F(R, weight_decay, 0, 0, 1e3, "AdamW weight decay, on matrices only")                          \
    F(R, adam_beta1, 0.9, 0, 0.999999999, "decay of the first moment")                             \
    F(R, adam_beta2, 0.999, 0, 0.999999999, "decay of the second moment")                          \
    F(R, adam_epsilon, 1e-8, 0, 1, "added to the root of the second moment")                       \
    F(R, max_grad_norm, 1.0, 0, 1e30, "global gradient norm is clipped to this; 0 = not clipped")  \
    F(R, num_train_epochs, EPOCHS, 0, 1e9, "passes over the training data")                        \
    F(I, max_steps, -1, -1, 1e12,                                                                  \
      "stop after so many steps, instead of num_train_epochs; -1 = by epochs")                     \
    F(I, per_device_train_batch_size, BATCH, 1, 1e6, "sequences (pairs) computed at once")         \
    F(I, gradient_accumulation_steps, 1, 1, 1e6, "batches added up into one optimizer step")       \
    F(I, max_length, 1024, 1, 1e7,                                                                 \
      "longest record in tokens; longer ones are dropped and counted")                             \
    F(B, use_peft, 0, 0, 1, "train an adapter (LoRA), not the weights")                            \
    F(I, lora_r, 16, 1, 65536, "rank of the adapter")                                              \
    F(R, lora_alpha, 32, 0, 1e9, "the adapter counts lora_alpha / lora_r")                         \
    F(R, lora_dropout, 0.05, 0, 0.99,                                                              \
      "share of its input that an adapter does not see in training; none in ppo")                  \
    F(S, lora_target_modules, "auto", 0, 0,                                                        \
      "matrices with an adapter: names, separated by commas; all-linear; auto = as PEFT chooses")  \
    F(B, use_rslora, 0, 0, 1, "the adapter counts lora_alpha / sqrt(lora_r)")                      \
    F(B, gradient_checkpointing, 0, 0, 1,                                                          \
      "keep less in training and compute it again: less memory, a third more time")                \
    F(R, memory_limit, 0, 0, 1e9,                                                                  \
      "GB that the run may take; chooses micro-batches and recomputation to fit; 0 = any")         \
    F(B, shuffle_dataset, 1, 0, 1, "a new order each epoch, drawn from the seed")                  \
    F(I, seed, 42, 0, 9e15, "seed of every random choice")                                         \
    F(I, logging_steps, LOGGING, 1, 1e9, "steps between lines of metrics")                         \
    F(I, eval_steps, 0, 0, 1e9, "steps between evaluations; 0 = only at the end")                  \
    F(I, save_steps, 0, 0, 1e9, "steps between checkpoints; 0 = only at the end")                  \
    F(S, output_dir, "", 0, 0,                                                                     \
      "run directory: config, metrics.jsonl, checkpoint; empty = nothing is written")              \
    F(S, save_dtype, "f32", "f32|bf16", 0,                                                         \
      "how trained weights are saved; what a run left as it was keeps its own")                    \
    F(B, resume, 0, 0, 1,                                                                          \
      "go on from the state in output_dir; the end is the same bits as without the stop")

/* Which judgements count. The data_config of a dataset says the same. */
#define RLHF_QUALIFIED_FIELDS(F)                                                                   \
    F(B, use_unqualified, 0, 0, 1, "also use what is marked \"qualified\": false")
#define RLHF_JUDGED_FIELDS(F)                                                                      \
    F(S, aspect, "", 0, 0, "the one of the records' \"aspects\" whose choice counts; "             \
      "empty = the overall choice")                                                                \
    RLHF_QUALIFIED_FIELDS(F)

/* What samples.jsonl of a run directory holds. */
#define RLHF_SAMPLE_FIELDS(F)                                                                      \
    F(I, sample_prompts, 16, 0, 1e4,                                                               \
      "prompts whose most likely answers, before and after, go to samples.jsonl; 0 = none")

#define RLHF_SFT_FIELDS(F)                                                                         \
    RLHF_TRAIN_FIELDS(F, 2e-5, 3, 8, 10)                                                           \
    RLHF_QUALIFIED_FIELDS(F)                                                                       \
    RLHF_SAMPLE_FIELDS(F)

#define RLHF_RM_FIELDS(F)                                                                          \
    RLHF_TRAIN_FIELDS(F, 1e-4, 1, 8, 10)                                                           \
    F(R, center_rewards_coefficient, 0, 0, 1e3,                                                    \
      "weight of (r_chosen + r_rejected)^2, which keeps rewards near 0")                           \
    F(I, normalize_samples, 256, 0, 1e6,                                                           \
      "answers sampled from the starting model; their scores get mean 0, std 1")                   \
    F(I, response_length, 64, 1, 1e6, "longest such answer in tokens")                             \
    F(R, temperature, 1.0, 1e-3, 1e3, "temperature of such answers")                               \
    F(S, annotator_weights, "none", 0, 0,                                                          \
      "whose judgement counts: none, majority, em, or a file that `rlhf raters --out` wrote")      \
    F(B, annotator_temperatures, 0, 0, 1,                                                          \
      "learn with the model how noisy each annotator's choices are")                               \
    F(R, annotator_learning_rate, 0.05, 0, 1e3, "learning rate of these log temperatures")         \
    RLHF_EVAL_FIELDS(F)

/* How preferences are evaluated. */
#define RLHF_EVAL_FIELDS(F)                                                                        \
    F(S, slice, "", 0, 0, "further fields to report by, separated by commas")                      \
    F(B, per_turn, 0, 0, 1, "also compare conversations at the end of each turn")                  \
    RLHF_JUDGED_FIELDS(F)

#define RLHF_RATERS_FIELDS(F)                                                                      \
    F(I, bootstrap, 1000, 0, 1e6, "bootstrap replicates for the intervals; 0 = no such intervals") \
    F(I, disputed, 10, 0, 1e6, "items with the most disagreement to list")                         \
    F(B, leave_out, 0, 0, 1,                                                                       \
      "predict each annotator from the others, by reliability and by majority")                    \
    RLHF_JUDGED_FIELDS(F)                                                                          \
    F(I, seed, 42, 0, 9e15, "seed of the bootstrap")

#define RLHF_PPO_FIELDS(F)                                                                         \
    RLHF_TRAIN_FIELDS(F, 3e-6, 1, 16, 1)                                                           \
    F(R, value_learning_rate, -1, -1, 1e3, "learning rate of the value model; -1 = learning_rate") \
    F(B, shared_trunk, 0, 0, 1,                                                                    \
      "values are a second head on the policy's states, from zeros: half the work of training")    \
    F(I, batch_size, 64, 1, 1e6, "episodes per update")                                            \
    F(I, num_ppo_epochs, 4, 1, 1e4, "passes over each batch of episodes")                          \
    F(I, num_mini_batches, 1, 1, 1e6, "optimizer steps per pass")                                  \
    F(I, response_length, 53, 1, 1e6, "longest answer in tokens")                                  \
    F(R, temperature, 0.7, 1e-3, 1e3, "temperature of sampling and of every log-probability")      \
    F(I, stop_token_id, -1, -1, 1e9,                                                               \
      "the token that ends an answer; -1 = the model's end of text, in a chat also of turn")       \
    F(R, missing_eos_penalty, 0, 0, 1e6, "subtracted from the score of an answer without an end")  \
    F(R, kl_coef, 0.05, 0, 1e6, "weight of the KL penalty in the reward of each token")            \
    F(S, kl_estimator, "k1", "k1|k3", 0, "how KL is estimated from log-probabilities")             \
    F(R, kl_target, 0, 0, 1e6,                                                                     \
      "adapt kl_coef until KL per answer (sum over tokens, nats) is this; 0 = fixed")              \
    F(R, kl_horizon, 10000, 1, 1e12, "episodes over which kl_coef adapts")                         \
    F(R, gamma, 1.0, 0, 1, "discount")                                                             \
    F(R, lam, 0.95, 0, 1, "lambda of generalised advantage estimation")                            \
    F(R, cliprange, 0.2, 0, 1e6, "policy ratio is clipped to 1 +- this")                           \
    F(R, cliprange_value, 0.2, 0, 1e6, "value is clipped to the old value +- this")                \
    F(R, vf_coef, 0.1, 0, 1e6, "weight of the value loss")                                         \
    F(B, whiten_rewards, 0, 0, 1, "divide token rewards by their standard deviation, mean kept")   \
    F(B, whiten_advantages, 1, 0, 1,                                                               \
      "advantages get mean 0 and variance 1 over the batch of episodes")                           \
    F(S, reward_at, "eos", "eos|p1", 0,                                                            \
      "token that bears the score: the last one, or the one after it")                             \
    F(B, shuffle_minibatches, 1, 0, 1, "a new order of episodes for each pass")                    \
    RLHF_SAMPLE_FIELDS(F)                                                                          \
    F(I, best_of_n, 0, 0, 1e4,                                                                     \
      "answers of the first policy to each of batch_size prompts, for best_of_n.json, which "      \
      "cost as much as so many rollouts; 0 = none")

#define RLHF_GENERATE_FIELDS(F)                                                                    \
    F(I, max_new_tokens, 64, 1, 1e6, "longest continuation in tokens")                             \
    F(R, temperature, 1.0, 0, 1e3, "0 = greedy")                                                   \
    F(I, top_k, 0, 0, 1e9, "sample among the k most likely tokens; 0 = all")                       \
    F(R, top_p, 1.0, 1e-6, 1, "sample among the most likely tokens that hold this share")          \
    F(I, num_return_sequences, 1, 1, 1e6, "continuations for each prompt")                         \
    F(I, batch_size, 32, 1, 1e6,                                                                   \
      "continuations computed at once; the result does not depend on it")                          \
    F(I, seed, 42, 0, 9e15, "seed of sampling")

#define RLHF_C_I_ int64_t
#define RLHF_C_R_ double
#define RLHF_C_B_ int
#define RLHF_C_S_ const char *
#define RLHF_MEMBER_(kind, name, def, lo, hi, help) RLHF_C_##kind##_ name;

typedef struct rlhf_sft_config {
    RLHF_SFT_FIELDS(RLHF_MEMBER_)
} rlhf_sft_config;
typedef struct rlhf_rm_config {
    RLHF_RM_FIELDS(RLHF_MEMBER_)
} rlhf_rm_config;
typedef struct rlhf_ppo_config {
    RLHF_PPO_FIELDS(RLHF_MEMBER_)
} rlhf_ppo_config;
typedef struct rlhf_generate_config {
    RLHF_GENERATE_FIELDS(RLHF_MEMBER_)
} rlhf_generate_config;
typedef struct rlhf_eval_config {
    RLHF_EVAL_FIELDS(RLHF_MEMBER_)
} rlhf_eval_config;
typedef struct rlhf_raters_config {
    RLHF_RATERS_FIELDS(RLHF_MEMBER_)
} rlhf_raters_config;

/* All fields at the defaults of their tables. Texts are static. */
rlhf_sft_config rlhf_sft_config_default(void);
rlhf_rm_config rlhf_rm_config_default(void);
rlhf_ppo_config rlhf_ppo_config_default(void);
rlhf_generate_config rlhf_generate_config_default(void);
rlhf_eval_config rlhf_eval_config_default(void);
rlhf_raters_config rlhf_raters_config_default(void);

/* The tables as data, for programs that parse options or print help. */
typedef struct rlhf_field {
    char kind; /* 'I' int64_t, 'R' double, 'B' int, 'S' const char * */
    const char *name;
    size_t offset;        /* of the member in its struct */
    double def, min, max; /* I, R, B */
    const char *text;     /* S: default */
    const char *choices;  /* S: allowed values separated by '|', or null */
    const char *help;
} rlhf_field;

typedef enum rlhf_config_kind {
    RLHF_CONFIG_SFT,
    RLHF_CONFIG_RM,
    RLHF_CONFIG_PPO,
    RLHF_CONFIG_GENERATE,
    RLHF_CONFIG_EVAL,
    RLHF_CONFIG_RATERS
} rlhf_config_kind;

/* The rows of a table, static; *n (not null) becomes their number. */
const rlhf_field *rlhf_config_fields(rlhf_config_kind kind, int *n);

/* ---- Generation ---- */

/* One answer. The pointers stay valid until the array is released or, in a reward function, until
 * it returns. prompt_index counts prompts, or records of the dataset; sample_index the
 * continuations of one prompt. */
typedef struct rlhf_sample {
    const char *prompt, *completion; /* NUL-terminated; the completion without special tokens */
    const int32_t *prompt_ids, *completion_ids;
    int n_prompt, n_completion; /* tokens; the completion includes its end token */
    int finished;       /* 1: it ended with an end token; 0: it was cut at the length limit */
    double logprob;     /* sum of log-probabilities of the completion's tokens, at the sampling
                           temperature */
    const char *record; /* the prompt's whole record as one line of JSON, or null */
    int prompt_index, sample_index;
} rlhf_sample;

/* Continues n prompts (NUL-terminated), num_return_sequences times each: *count samples in order of
 * prompts, released with rlhf_samples_free. A sample is a function of the weights, the prompt, its
 * index and the seed alone; what prompts begin with alike is computed once. RLHF_ERR_ARG for a
 * reward model or a config out of range, RLHF_ERR_CONTEXT for a prompt that leaves no room,
 * RLHF_STOPPED if the progress hook asked to stop. In each case *samples is null. */
rlhf_status rlhf_generate(rlhf_model *model, rlhf_tokenizer *tokenizer,
                          const rlhf_generate_config *config, const char *const *prompts, int n,
                          rlhf_sample **samples, int *count);

/* The same for the prompts of a dataset of kind RLHF_DATA_PROMPT; samples carry their records.
 * Answers in a conversation also end with its chat template's end of turn, if that is a token. */
rlhf_status rlhf_generate_dataset(rlhf_model *model, rlhf_tokenizer *tokenizer,
                                  const rlhf_generate_config *config, rlhf_dataset *prompts,
                                  rlhf_sample **samples, int *count);

/* Releases an array of samples and all they point at. Null is allowed. */
void rlhf_samples_free(rlhf_ctx *ctx, rlhf_sample *samples, int count);

/* ---- Evaluation ---- */

/* Scores every record of a dataset of kind RLHF_DATA_SCORE (or SFT) with a reward model:
 * scores[rlhf_dataset_count] are normalised rewards, as rlhf_model_score gives them. */
rlhf_status rlhf_score_dataset(rlhf_model *reward, rlhf_dataset *dataset, float *scores);

/* One JSON object about a model on a dataset. Kind SFT or SCORE: nll (nats per token), perplexity,
 * mean_token_accuracy, num_tokens; with reference (may be null) also kl, the mean over records of
 * the exact KL(model || reference) summed over the tokens that bear loss. Kind PREFERENCE, with a
 * reward model: rlhf_eval_pairs with the default configuration. */
rlhf_status rlhf_eval(rlhf_model *model, rlhf_dataset *dataset, rlhf_model *reference, char **json);

/* One JSON object about a reward model on a dataset of kind PREFERENCE: pairs, accuracy (ties count
 * half) with its 95 % Wilson interval, margin in normalised rewards, ece (expected calibration
 * error of sigmoid(r_chosen - r_rejected), ten bins), loss; beside them length_accuracy (the longer
 * answer wins), agreement (share of the other judgements of a pair that agree with one of it) and
 * ceiling (the accuracy that always being right has in the eyes of judges who agree so often); null
 * where there is nothing to count. The same for every value of domain, annotator_type, annotator,
 * safety, culture, turns, length (terciles of the answers' tokens) and of each field in
 * config->slice. Of a list each element counts, of an object each member that is true or has a text
 * or number. per_turn: also after each turn of the assistant; RLHF_ERR_ARG unless the dataset was
 * opened with `turns`. */
rlhf_status rlhf_eval_pairs(rlhf_model *reward, rlhf_dataset *dataset,
                            const rlhf_eval_config *config, char **json);

/* ---- Annotators ---- */

/* Who judged what, how far they agree and whom to trust. Reads n files of preferences with
 * "annotator": "chosen" and "rejected", or two "answers" and "choice" (0 or "A", 1 or "B", "tie",
 * "both_bad", "skip"); optional: prompt, annotator_type (or kind), domain, item, order (the
 * answers' indices as shown, chosen being 0 and rejected 1), seconds, gold (the right answer as
 * choice names it, or true or false: this judgement is right), aspects (further choices by name),
 * qualified (false: the judgement does not count). Judgements of the same texts and
 * item are of one item; of two by one annotator the later counts; "both_bad" counts as a tie.
 *
 * *report: one JSON object. Overall and by domain, annotator_type and annotator: judgements,
 * agreement with others, Krippendorff's alpha (nominal), Cohen's kappa (mean over pairs of
 * annotators with ten common items or more), gold accuracy, share of choices for the answer shown
 * first, median seconds, reliability; each with *_low and *_high (95 %; Wilson for shares,
 * bootstrap over items for the others); reliability of each annotator by domain with the weight
 * (log-odds) of a vote; disputed items. Reliability: expectation-maximisation with the true
 * preference of each item latent (Dawid and Skene 1979), shrunk to annotator, kind and overall mean
 * by beta priors whose strengths are estimated, too. reward and tokenizer (may be null) inform the
 * true preferences.
 *
 * *labels (may be null): JSON lines, one record of kind PREFERENCE for each item with a judgement:
 * the answer more likely preferred as chosen, soft_label, weight. Both texts are released with
 * rlhf_free. RLHF_ERR_DATA with file:line for a record that cannot be used. */
rlhf_status rlhf_raters(rlhf_ctx *ctx, const char *const *paths, int n,
                        const rlhf_raters_config *config, rlhf_model *reward,
                        rlhf_tokenizer *tokenizer, char **report, char **labels);

/* ---- Training ---- */

/* Scores n finished answers into reward[n]; NaN means "does not apply" and counts as 0, an infinite
 * reward is an error. Called from the training thread, once an update, never concurrently. A return
 * of RLHF_STOPPED ends the run with that status, any other than RLHF_OK with RLHF_ERR_CALLBACK; the
 * update is then not done and its state not saved. The function may use the library, also with the
 * same context, but what it opens in that context is given back if the update fails. */
typedef rlhf_status (*rlhf_reward_fn)(void *user, const rlhf_sample *samples, int n, float *reward);

/* Trainers change the model in place and keep pointers to all they are given until they are closed:
 * close them first. All objects are of one context. tokenizer (saved with the model) and eval may
 * be null. The texts in a config must live as long as the trainer. RLHF_ERR_ARG for a config out of
 * range or a dataset of another kind, RLHF_ERR_CONTEXT for a record longer than the model's
 * positions. */
rlhf_status rlhf_sft_open(rlhf_model *model, rlhf_tokenizer *tokenizer, rlhf_dataset *train,
                          rlhf_dataset *eval, const rlhf_sft_config *config,
                          rlhf_trainer **trainer);

/* model: a scorer, from rlhf_model_clone(lm, RLHF_HEAD_SCORE) or an earlier run; start: the
 * language model that samples the answers by which scores are normalised, may be null (then the
 * training answers are used). annotator_weights other than "none" gives train's records the labels
 * and weights of rlhf_raters: "em" and "majority" from these records themselves, else from a file.
 * annotator_temperatures takes each record's own choice instead, and scales its margin by how noisy
 * its annotator is found to be (rlhf_rm_temperatures). */
rlhf_status rlhf_rm_open(rlhf_model *model, rlhf_model *start, rlhf_tokenizer *tokenizer,
                         rlhf_dataset *train, rlhf_dataset *eval, const rlhf_rm_config *config,
                         rlhf_trainer **trainer);

/* The temperatures that an rm trainer with annotator_temperatures has learned, as one JSON object,
 * released with rlhf_free: {annotator: {"judgements", "temperature"}}, in the order of their first
 * records. 1 is as noisy as the mean of all judgements; above it an annotator's choices tell less.
 * An empty object where none are learned. */
rlhf_status rlhf_rm_temperatures(rlhf_trainer *trainer, char **json);

/* Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019). Rewards come from a
 * reward model, from a function, or from both (added). The reference is a copy of the policy as it
 * is now. The value model starts as a copy of the reward model, or of the policy's trunk with a
 * zero head; with shared_trunk it is such a head on the policy itself. prompts: kind
 * RLHF_DATA_PROMPT; each leaves room for response_length tokens, else RLHF_ERR_CONTEXT. Without a
 * tokenizer the function's samples have empty completion texts. */
rlhf_status rlhf_ppo_open(rlhf_model *policy, rlhf_tokenizer *tokenizer, rlhf_dataset *prompts,
                          rlhf_model *reward, rlhf_reward_fn function, void *user,
                          const rlhf_ppo_config *config, rlhf_trainer **trainer);

/* One step: an optimizer step (sft, rm) or an update, that is a rollout and its optimizer steps
 * (ppo). No evaluation, no line of metrics, no checkpoint: those are rlhf_trainer_run's.
 * RLHF_ERR_ARG when all steps are done; RLHF_ERR_NUMERIC leaves the weights as the last good
 * optimizer step made them. A step that failed may be tried again. */
rlhf_status rlhf_trainer_step(rlhf_trainer *trainer);

/* The remaining steps, the evaluation, and everything in output_dir. RLHF_STOPPED if the progress
 * hook asked: the state is then saved (where there is an output_dir), and `resume` goes on from it.
 * Another call goes on, too. */
rlhf_status rlhf_trainer_run(rlhf_trainer *trainer);

/* Steps since the run began, those before a resume included, and steps of the whole run. */
int64_t rlhf_trainer_steps_done(const rlhf_trainer *trainer);
int64_t rlhf_trainer_steps_total(const rlhf_trainer *trainer);

/* The newest value of a metric by its name ("loss", "objective/kl", "eval_accuracy"), NaN if there
 * is none. */
double rlhf_trainer_metric(const rlhf_trainer *trainer, const char *name);

/* Bytes that a run takes at its highest, known when its trainer is opened. */
typedef struct rlhf_memory {
    int64_t weights;     /* of all roles; what several share counts once */
    int64_t adapters;    /* of all roles, with their score heads */
    int64_t optimizer;   /* gradients and both moments */
    int64_t activations; /* of one micro-batch, and what a rollout keeps */
    int64_t cache;       /* keys and values of sampling */
    int64_t scratch;     /* logits, packed weights, blocks of products */
    int64_t other;       /* data, tokenizer, program */
    int64_t total;
} rlhf_memory;

/* All zero for null. */
rlhf_memory rlhf_trainer_memory(const rlhf_trainer *trainer);

/* All newest metrics as one JSON object, released with rlhf_free. */
rlhf_status rlhf_trainer_metrics(rlhf_trainer *trainer, char **json);

/* Null is allowed. The trained model stays open. */
void rlhf_trainer_close(rlhf_trainer *trainer);

#ifdef __cplusplus
}
#endif
#endif
