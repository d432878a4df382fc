/* The program (sections CLI, TALK, STAGE, COMMAND), run as a user runs it: ./rlhf, or what
 * RLHF_PROGRAM names. Every command on small models, its JSON line, help, exit codes, what it says
 * about bad input and that nothing half-written is left behind, and a run that is interrupted and
 * goes on. */

#define _GNU_SOURCE 1
#include "../rlhf.h"
#include "test.h"

#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <zlib.h>

/* ---- helpers --------------------------------------------------------------------------------- */

static const char *program(void) {
    const char *path = getenv("RLHF_PROGRAM");
    return path && *path ? path : "./rlhf";
}

#define NEED_PROGRAM()                                                                             \
    do {                                                                                           \
        if (access(program(), X_OK) != 0) SKIP("the program is not built");                        \
    } while (0)

static char *slurp(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    size_t none;
    if (!len) len = &none;
    *len = 0;
    if (!f) return NULL;
    char *p = NULL;
    size_t cap = 0, got;
    do {
        /* A file that grows meanwhile is read in small pieces: only a full buffer grows. */
        if (*len == cap) p = realloc(p, (cap = 2 * cap + 65536) + 1);
        got = fread(p + *len, 1, cap - *len, f);
        *len += got;
    } while (got);
    p[*len] = 0;
    fclose(f);
    return p;
}

static char out[1 << 18], err[1 << 16]; /* what the last run printed */

static void keep(const char *name, char *to, size_t size) {
    char *text = slurp(test_path(name), NULL);
    snprintf(to, size, "%s", text ? text : "");
    free(text);
}

/* Runs a shell command with the program in $R and the test's directory in $D; its exit code. */
static int run(const char *command) {
    static char line[16384];
    char here[1024];
    snprintf(here, sizeof here, "%s", test_dir());
    snprintf(line, sizeof line, "R='%s'; D='%s'; { %s ; } >'%s/stdout' 2>'%s/stderr' </dev/null",
             program(), here, command, here, here);
    int status = system(line);
    keep("stdout", out, sizeof out);
    keep("stderr", err, sizeof err);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

#define RUN(command, code)                                                                         \
    do {                                                                                           \
        int run_code_ = run(command);                                                              \
        if (run_code_ != (code))                                                                   \
            test_fail(__FILE__, __LINE__, "%s\n      ends with %d, expected %d: %.500s", command,  \
                      run_code_, code, err);                                                       \
    } while (0)

/* The last line of standard output as JSON. */
static json_t *last_json(void) {
    size_t n = strlen(out);
    while (n && out[n - 1] == '\n') n--;
    size_t at = n;
    while (at && out[at - 1] != '\n') at--;
    return json_loadb(out + at, n - at, 0, NULL);
}

/* The last line holds these keys, separated by spaces. */
static void check_keys(int line, const char *keys) {
    json_t *j = last_json();
    char list[512];
    snprintf(list, sizeof list, "%s", keys);
    if (!json_is_object(j)) test_fail(__FILE__, line, "the last line is no JSON object");
    for (char *key = strtok(list, " "); key; key = strtok(NULL, " "))
        if (!json_object_get(j, key)) test_fail(__FILE__, line, "\"%s\" is not in the JSON", key);
    json_decref(j);
}

static double number(const char *key) {
    json_t *j = last_json();
    const json_t *v = json_object_get(j, key);
    double x = json_is_number(v) ? json_number_value(v) : NAN;
    json_decref(j);
    return x;
}

/* The value of a text key; the last two results stay valid. */
static const char *text_of(const char *key) {
    static char texts[2][4096];
    static int next;
    char *to = texts[next++ % 2];
    json_t *j = last_json();
    const char *s = json_string_value(json_object_get(j, key));
    snprintf(to, sizeof texts[0], "%s", s ? s : "(none)");
    json_decref(j);
    return to;
}

static bool exists(const char *name) {
    return access(test_path(name), F_OK) == 0;
}

static bool same_files(const char *a, const char *b) {
    size_t na, nb;
    char *x = slurp(test_path(a), &na), *y = slurp(test_path(b), &nb);
    bool same = x && y && na == nb && memcmp(x, y, na) == 0;
    free(x);
    free(y);
    return same;
}

/* A command that fails: the exit code, exactly one line on stderr that begins with "rlhf: " and
 * holds the three texts (null: not asked for), and no model files under $D/out. */
static void refuse(int line, const char *command, int code, const char *a, const char *b,
                   const char *c) {
    int got = run(command);
    size_t n = strlen(err);
    if (got != code)
        test_fail(__FILE__, line, "%s\n      ends with %d, expected %d: %.400s", command, got, code,
                  err);
    if (strncmp(err, "rlhf: ", 6) || !n || strchr(err, '\n') != err + n - 1)
        test_fail(__FILE__, line, "%s\n      is not answered by one line: %.600s", command, err);
    const char *const want[] = {a, b, c};
    for (int i = 0; i < 3; i++)
        if (want[i] && !strstr(err, want[i]))
            test_fail(__FILE__, line, "%s\n      \"%s\" is not in: %.400s", command, want[i], err);
    if (exists("out/model.safetensors") || exists("out/config.json") || exists("out/checkpoint"))
        test_fail(__FILE__, line, "%s\n      leaves files of a model", command);
    if (code && exists("out")) {
        DIR *dir = opendir(test_path("out"));
        for (struct dirent *e; dir && (e = readdir(dir));)
            if (strstr(e->d_name, ".tmp"))
                test_fail(__FILE__, line, "%s\n      leaves out/%s", command, e->d_name);
        if (dir) closedir(dir);
    }
    test_remove(test_path("out"));
}

#define REFUSE(command, code, ...) refuse(__LINE__, command, code, __VA_ARGS__)

static const char corpus[] =
    "one two three four five six seven eight nine ten\nthe cat sat on the mat and the dog sat on "
    "the cat\nhow much is one and one? one and one is two.\nhow much is two and two? it is four.\n";

/* A tokenizer in $D/tok, a language model in $D/lm, records of every kind. */
static bool setup(void) {
    test_write("corpus.txt", corpus);
    test_write("config.json",
               "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":"
               "300,\"hidden_size\":32,\"num_hidden_layers\":2,\"num_attention_heads\":4,"
               "\"num_key_value_heads\":2,\"intermediate_size\":48,\"max_position_embeddings\":48,"
               "\"tie_word_embeddings\":true}");
    test_write("text.jsonl", "{\"text\":\"one two three four\"}\n{\"text\":\"the cat sat\"}\n"
                             "{\"prompt\":\"how much is one and one?\",\"completion\":\" two\"}\n"
                             "{\"messages\":[{\"role\":\"user\",\"content\":\"one\"},{\"role\":"
                             "\"assistant\",\"content\":\"two\"}]}\n{\"text\":\"the dog\"}\n");
    test_write("pairs.jsonl",
               "{\"prompt\":\"one and one is\",\"chosen\":\" two\",\"rejected\":\" nine\","
               "\"domain\":\"sums\",\"annotator_type\":\"expert\"}\n{\"prompt\":\"the cat\","
               "\"chosen\":\" sat\",\"rejected\":\" on\",\"domain\":\"cats\"}\n"
               "{\"prompt\":\"two\",\"chosen\":\" three\",\"rejected\":\" one\"}\n");
    test_write("prompts.jsonl", "{\"prompt\":\"one\",\"id\":1}\n{\"prompt\":\"the cat\",\"id\":2}\n"
                                "{\"prompt\":\"how much\",\"id\":3}\n");
    if (run("$R tokenizer --train $D/corpus.txt --vocab_size 300 --out $D/tok --json") != 0 ||
        run("$R sft --init $D/config.json --tokenizer $D/tok --data $D/text.jsonl --out $D/lm "
            "--max_steps 4 --learning_rate 1e-3 --json") != 0) {
        test_fail(__FILE__, __LINE__, "setup: %s", err);
        return false;
    }
    return true;
}

static bool setup_rm(void) {
    if (!setup()) return false;
    if (run("$R rm --model $D/lm --data $D/pairs.jsonl --out $D/rm --max_steps 4 --learning_rate "
            "1e-3 --normalize_samples 8 --response_length 6 --json") != 0) {
        test_fail(__FILE__, __LINE__, "setup: %s", err);
        return false;
    }
    return true;
}

/* ---- what works ------------------------------------------------------------------------------ */

/* Lines of answers before the first step, then as many after the last one, to the same prompts. */
static void check_samples(const char *name, int last, int prompts) {
    char *text = slurp(test_path(name), NULL), first[16][64] = {{0}};
    int n = 0;
    for (char *line = text ? strtok(text, "\n") : NULL; line; line = strtok(NULL, "\n"), n++) {
        json_t *j = json_loads(line, 0, NULL);
        const char *prompt = json_string_value(json_object_get(j, "prompt"));
        CHECK_EQ_I(json_integer_value(json_object_get(j, "step")), n < prompts ? 0 : last);
        CHECK(json_is_string(json_object_get(j, "completion")));
        if (prompt && n < prompts) snprintf(first[n], sizeof first[n], "%s", prompt);
        else if (prompt && n < 2 * prompts) CHECK(!strncmp(first[n - prompts], prompt, 63));
        json_decref(j);
    }
    CHECK_EQ_I(n, 2 * prompts);
    free(text);
}

TEST(training_commands) {
    NEED_PROGRAM();
    test_write("corpus.txt", corpus);
    RUN("$R tokenizer --train $D/corpus.txt $D/corpus.txt --vocab_size 280 --out $D/tok --json", 0);
    check_keys(__LINE__, "vocab_size bytes out");
    CHECK_NEAR(number("vocab_size"), 280, 0);
    CHECK_NEAR(number("bytes"), 2 * (double)strlen(corpus), 0);
    CHECK(exists("tok/tokenizer.json") && exists("tok/tokenizer_config.json"));
    REQUIRE(setup());
    RUN("$R sft --model $D/lm --data $D/text.jsonl --eval_data $D/text.jsonl --out $D/sft "
        "--max_steps 3 --logging_steps 1 --json",
        0);
    check_keys(__LINE__, "step loss mean_token_accuracy eval_loss grad_norm learning_rate epoch "
                         "num_tokens out records dropped weights_hash");
    CHECK_NEAR(number("step"), 3, 0);
    CHECK_NEAR(number("records"), 5, 0);
    CHECK_EQ_I(strlen(text_of("weights_hash")), 16);
    static const char *const files[] = {"sft/config.json", "sft/model.safetensors",
                                        "sft/generation_config.json", "sft/tokenizer.json",
                                        "sft/metrics.jsonl", "sft/run.json"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if (!exists(files[i])) test_fail(__FILE__, __LINE__, "no %s", files[i]);
    char *lines = slurp(test_path("sft/metrics.jsonl"), NULL);
    int count = 0;
    for (char *c = lines; c && *c; c++) count += *c == '\n';
    CHECK_EQ_I(count, 3);
    free(lines);

    /* What was trained, in half the bytes; it loads. */
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/brief --max_steps 1 "
        "--save_dtype bf16",
        0);
    RUN("grep -q BF16 $D/brief/model.safetensors && ! grep -q F32 $D/brief/model.safetensors", 0);
    RUN("grep -q bfloat16 $D/brief/config.json && $R info --model $D/brief", 0);

    RUN("$R rm --model $D/sft --data $D/pairs.jsonl --eval_data $D/pairs.jsonl --out $D/rm "
        "--max_steps 4 --learning_rate 1e-3 --normalize_samples 8 --response_length 6 --json",
        0);
    check_keys(__LINE__, "step loss accuracy margin eval_accuracy score_mean score_std domain "
                         "annotator_type out records dropped weights_hash");
    RUN("$R ppo --model $D/sft --reward $D/rm --data $D/prompts.jsonl --out $D/ppo --max_steps 2 "
        "--batch_size 4 --response_length 8 --best_of_n 8 --json",
        0);
    check_keys(__LINE__, "step objective/kl objective/kl_exact objective/scores "
                         "objective/rlhf_reward objective/entropy objective/non_score_reward "
                         "policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg "
                         "val/ratio val/num_eos_tokens lr episode weights_hash out");
    CHECK_NEAR(number("episode"), 8, 0);
    CHECK(exists("ppo/model.safetensors"));
    /* Answers before and after to the same prompts; what the reward model finds on held-out pairs;
     * the command itself, to be run again. */
    check_samples("ppo/samples.jsonl", 2, 3);
    check_samples("sft/samples.jsonl", 3, 5);
    CHECK(exists("rm/eval.json") && exists("ppo/best_of_n.json") && !exists("rm/samples.jsonl"));
    RUN("$R ppo --config $D/ppo/run.json --out $D/again --quiet", 0);
    CHECK(same_files("ppo/model.safetensors", "again/model.safetensors"));
    CHECK(same_files("ppo/samples.jsonl", "again/samples.jsonl"));
    CHECK(same_files("ppo/best_of_n.json", "again/best_of_n.json"));
    RUN("$R report $D/sft $D/rm $D/ppo --out $D/report.html --json", 0);
    CHECK_NEAR(number("runs"), 3, 0);
    CHECK(exists("report.html"));
    RUN("$R report $D/sft $D/tok --out $D/report.html", 1);
    CHECK(strstr(err, "tok: not a run directory") != NULL);
    RUN("$R report $D/sft", 2);
    CHECK(strstr(err, "--out PATH is missing") != NULL);
    RUN("$R report --out $D/report.html", 2);
    CHECK(strstr(err, "report: no run") != NULL);
    /* Without --json the results are lines. */
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/x --max_steps 1 --quiet", 0);
    CHECK(strstr(out, "loss") && !strchr(out, '{'));
    CHECK_EQ_S(err, "");
}

TEST(other_commands) {
    NEED_PROGRAM();
    REQUIRE(setup_rm());
    RUN("$R generate --model $D/lm --prompt 'the cat' --max_new_tokens 6 --json", 0);
    check_keys(__LINE__, "samples mean_length finished completion");
    RUN("$R generate --model $D/lm --prompt 'the cat' --max_new_tokens 6 --temperature 0", 0);
    char greedy[sizeof out];
    memcpy(greedy, out, sizeof out);
    RUN("printf 'the cat\\none\\n' | $R generate --model $D/lm --max_new_tokens 6 --temperature 0",
        0);
    CHECK(strncmp(out, greedy, strlen(greedy)) == 0 && strlen(out) > strlen(greedy));
    RUN("$R generate --model $D/lm --data $D/prompts.jsonl --max_new_tokens 6 --out $D/a.jsonl "
        "--num_return_sequences 2 --json",
        0);
    CHECK_NEAR(number("samples"), 6, 0);
    char *answers = slurp(test_path("a.jsonl"), NULL);
    int count = 0;
    for (char *line = answers ? strtok(answers, "\n") : NULL; line; line = strtok(NULL, "\n")) {
        json_t *j = json_loads(line, 0, NULL);
        CHECK_NEAR(json_integer_value(json_object_get(j, "id")), count / 2 + 1, 0);
        CHECK(json_is_string(json_object_get(j, "completion")));
        CHECK(json_is_number(json_object_get(j, "logprob")));
        CHECK(json_is_boolean(json_object_get(j, "finished")));
        json_decref(j);
        count++;
    }
    CHECK_EQ_I(count, 6);
    free(answers);
    RUN("$R score --model $D/rm --data $D/a.jsonl --json", 0);
    check_keys(__LINE__, "records dropped mean std");
    CHECK(strncmp(out, "{", 1) == 0 && strstr(out, "\"score\":") != NULL);
    RUN("$R score --model $D/rm --data $D/a.jsonl --out $D/scored.jsonl --json", 0);
    CHECK_NEAR(number("records"), 6, 0);
    CHECK(exists("scored.jsonl"));
    RUN("$R score --model $D/rm --data $D/a.jsonl --max_steps 2 --json", 0);
    CHECK_NEAR(number("records"), 2, 0);
    RUN("$R eval --model $D/lm --data $D/text.jsonl --ref $D/lm --json", 0);
    check_keys(__LINE__, "records dropped num_tokens nll perplexity mean_token_accuracy kl");
    CHECK_NEAR(number("perplexity"), exp(number("nll")), 1e-6 * exp(number("nll")));
    CHECK_NEAR(number("kl"), 0, 1e-6);
    RUN("$R eval --model $D/rm --data $D/pairs.jsonl --json", 0);
    check_keys(__LINE__, "pairs accuracy accuracy_low accuracy_high margin ece loss "
                         "length_accuracy agreement ceiling domain annotator_type length");
    RUN("$R eval --model $D/rm --data $D/pairs.jsonl --slice prompt --per_turn --json", 0);
    check_keys(__LINE__, "prompt");
    RUN("sed 's/\"prompt\"/\"annotator\":\"ann\",&/' $D/pairs.jsonl >$D/judged.jsonl", 0);
    RUN("$R raters --data $D/judged.jsonl --reward $D/rm --leave_out --out $D/l.jsonl --json", 0);
    check_keys(__LINE__, "judgements items agreement alpha kappa gold first seconds reliability "
                         "domain annotator_type annotator prediction reliabilities disputed");
    RUN("$R raters --data $D/judged.jsonl $D/judged.jsonl --bootstrap 10", 0);
    CHECK(strstr(out, "reliability") != NULL);
    RUN("$R raters --data $D/pairs.jsonl", 1);
    CHECK(strstr(err, "pairs.jsonl:1: missing \"annotator\" (expected a string)") != NULL);
    RUN("$R eval --model $D/rm --data $D/l.jsonl --quiet", 0);
    RUN("printf 'the cat\\n\\none' | $R tokenize --tokenizer $D/tok --json", 0);
    check_keys(__LINE__, "lines tokens");
    CHECK_NEAR(number("lines"), 3, 0);
    RUN("printf 'the cat\\n' | $R tokenize --model $D/lm", 0);
    CHECK(out[0] >= '0' && out[0] <= '9');
    RUN("$R info --json", 0);
    check_keys(__LINE__, "cpu isa available threads version");
    RUN("$R info --model $D/lm --json", 0);
    check_keys(__LINE__, "model_type head vocab_size hidden_size num_hidden_layers parameters "
                         "weights_hash bytes");
    CHECK_EQ_S(text_of("head"), "lm");
    RUN("$R info --model $D/rm --json", 0);
    CHECK_EQ_S(text_of("head"), "score");
    RUN("$R export --model $D/lm --gguf q8_0 --out $D/lm.gguf --json", 0);
    check_keys(__LINE__, "out parameters bytes");
    size_t bytes = 0;
    char *file = slurp(test_path("lm.gguf"), &bytes);
    CHECK(bytes > 4 && memcmp(file, "GGUF", 4) == 0);
    CHECK_NEAR(number("bytes"), (double)bytes, 0);
    free(file);
    REFUSE("$R export --model $D/rm --gguf f32 --out $D/rm.gguf", 1, "reward model", NULL, NULL);
    CHECK(!exists("rm.gguf"));
    RUN("$R info --model test/golden/gpt2", 0);
    CHECK(strstr(out, "gpt2") != NULL);
}

/* ---- help and options ------------------------------------------------------------------------ */

/* --help lists "--name default" and the help of every field of the command's configuration. */
TEST(help_lists_every_option) {
    NEED_PROGRAM();
    RUN("$R --help", 0);
    static const char *const commands[] = {"sft",      "rm",        "ppo",  "generate", "score",
                                           "tokenize", "tokenizer", "eval", "raters",   "export",
                                           "chat",     "info"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strstr(out, commands[i])) test_fail(__FILE__, __LINE__, "no %s", commands[i]);
#define ROW(kind, name, def, lo, hi, help) ROW_##kind(name, def, help)
#define ROW_I(name, def, help)             {#name, NULL, (double)(def), 0, help},
#define ROW_R(name, def, help)             {#name, NULL, (double)(def), 0, help},
#define ROW_B(name, def, help)             {#name, NULL, (double)(def), 1, help},
#define ROW_S(name, def, help)             {#name, def, 0, 0, help},
    typedef struct row {
        const char *name, *text;
        double def;
        int boolean;
        const char *help;
    } row;
    static const row sft[] = {RLHF_SFT_FIELDS(ROW)}, rm[] = {RLHF_RM_FIELDS(ROW)};
    static const row ppo[] = {RLHF_PPO_FIELDS(ROW)}, gen[] = {RLHF_GENERATE_FIELDS(ROW)};
    static const row *const tables[] = {sft, rm, ppo, gen};
    static const size_t sizes[] = {sizeof sft / sizeof *sft, sizeof rm / sizeof *rm,
                                   sizeof ppo / sizeof *ppo, sizeof gen / sizeof *gen};
    for (int k = 0; k < 4; k++) {
        char command[64];
        snprintf(command, sizeof command, "$R %s --help", commands[k]);
        RUN(command, 0);
        CHECK_EQ_S(err, "");
        for (size_t i = 0; i < sizes[k]; i++) {
            const row *f = tables[k] + i;
            char want[128], def[64];
            if (f->text) snprintf(def, sizeof def, "%s", *f->text ? f->text : "\"\"");
            else if (f->boolean) snprintf(def, sizeof def, "%s", f->def != 0 ? "true" : "false");
            else snprintf(def, sizeof def, "%g", f->def);
            snprintf(want, sizeof want, "--%s %s ", f->name, def);
            const char *at = strstr(out, want), *end = at ? strchr(at, '\n') : NULL;
            const char *help = at ? strstr(at, f->help) : NULL;
            if (!help || help > end)
                test_fail(__FILE__, __LINE__, "rlhf %s --help lacks %s", commands[k], want);
        }
    }
    for (size_t k = 0; k < sizeof commands / sizeof *commands; k++) {
        static const char *const common[] = {"--threads", "--seed",  "--max_steps", "--isa",
                                             "--quiet",   "--help",  "--json",      "--config"};
        char command[64];
        snprintf(command, sizeof command, "$R %s --help", commands[k]);
        RUN(command, 0);
        for (size_t i = 0; i < sizeof common / sizeof *common; i++)
            if (!strstr(out, common[i]))
                test_fail(__FILE__, __LINE__, "rlhf %s --help lacks %s", commands[k], common[i]);
    }
    RUN("$R --version", 0);
    CHECK(strstr(out, RLHF_VERSION) != NULL);
}

TEST(usage_errors) {
    NEED_PROGRAM();
    RUN("$R", 2);
    REFUSE("$R sfd", 2, "sfd", "sft", NULL);
    REFUSE("$R generat --prompt x", 2, "generat", "\"generate\"", NULL);
    REFUSE("$R frobnicate", 2, "frobnicate", "--help", NULL);
    REFUSE("$R sft --learning_rat 1", 2, "--learning_rat", "--learning_rate", NULL);
    REFUSE("$R sft --learning-rat=1", 2, "--learning_rate", NULL, NULL);
    REFUSE("$R generate --temprature 1", 2, "--temperature", NULL, NULL);
    REFUSE("$R score --zzzzzzzz 1", 2, "--zzzzzzzz", "--help", NULL);
    REFUSE("$R score --learning_rate 1", 2, "--learning_rate", NULL, NULL);
    REFUSE("$R sft", 2, "--model", "missing", NULL);
    REFUSE("$R sft --model x", 2, "--data", NULL, NULL);
    REFUSE("$R sft --model x --data y", 2, "--out", NULL, NULL);
    REFUSE("$R sft --init x --data y --out $D/out", 2, "--tokenizer", NULL, NULL);
    REFUSE("$R ppo --model x --data y --out $D/out", 2, "--reward", NULL, NULL);
    REFUSE("$R tokenizer --out $D/out", 2, "--train", NULL, NULL);
    REFUSE("$R export --model x --out y", 2, "--gguf", "--merge", "missing");
    REFUSE("$R export --model x --out y --gguf f32 --merge", 2, "not both", NULL, NULL);
    REFUSE("$R export --model x --out y --gguf f32 --save_dtype f32", 2, "--merge", NULL, NULL);
    REFUSE("$R export --model x --out y --merge --save_dtype f16", 2, "f16", "bf16", NULL);
    REFUSE("$R chat --model x --num_return_sequences 2", 2, "one answer", NULL, NULL);
    REFUSE("$R chat", 2, "--model", "missing", NULL);
    REFUSE("$R export --model x --out y --gguf q4", 2, "q4", "f32|f16|bf16|q8_0", NULL);
    REFUSE("$R sft --model", 2, "--model needs a value", NULL, NULL);
    REFUSE("$R sft --learning_rate", 2, "--learning_rate needs a value", NULL, NULL);
    REFUSE("$R sft --model --data y", 2, "--model needs a value", NULL, NULL);
    REFUSE("$R sft --learning_rate fast", 2, "--learning_rate", "fast", "a number from 0");
    REFUSE("$R sft --learning_rate -1", 2, "--learning_rate", "-1", NULL);
    REFUSE("$R sft --learning_rate nan", 2, "--learning_rate", NULL, NULL);
    REFUSE("$R sft --warmup_steps 1.5", 2, "--warmup_steps", "an integer", NULL);
    REFUSE("$R sft --max_steps=", 2, "--max_steps", NULL, NULL);
    REFUSE("$R sft --lr_scheduler_type stairs", 2, "stairs", "linear|cosine|constant", NULL);
    REFUSE("$R ppo --kl_estimator 'k1|k3'", 2, "expected one of k1|k3", NULL, NULL);
    REFUSE("$R sft --shuffle_dataset=maybe --model x", 2, "--shuffle_dataset", "maybe", NULL);
    REFUSE("$R sft extra", 2, "extra", NULL, NULL);
    REFUSE("$R info --threads 0", 2, "--threads", NULL, NULL);
    REFUSE("$R info --threads two", 2, "--threads", "two", NULL);
    REFUSE("$R info --isa mmx", 2, "--isa", "mmx", "ref");
    REFUSE("$R tokenizer --train x --vocab_size 5 --out $D/out", 2, "--vocab_size", "257", NULL);
    REFUSE("$R eval --model test/golden/gpt2 --data x --type both", 2, "--type", "both", NULL);
}

TEST(options_in_every_form) {
    NEED_PROGRAM();
    REQUIRE(setup());
#define BASE "$R sft --model $D/lm --data $D/text.jsonl --json --quiet "
    RUN(BASE "--out $D/a --max_steps 2 --learning_rate 1e-3", 0);
    char want[32];
    snprintf(want, sizeof want, "%s", text_of("weights_hash"));
    static const char *const same[] = {
        "--out=$D/b --max-steps=2 --learning-rate=1e-3",
        "--out $D/b --max-steps 2 --learning_rate 0.001 --threads 1 --isa ref",
        "--learning_rate 1e-3 --out $D/b --max_steps 2 --seed 42 --shuffle_dataset true",
        ("--out $D/b --max_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 2 "
         "--gradient_accumulation_steps 4")};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        char command[1024];
        snprintf(command, sizeof command, BASE "%s", same[i]);
        RUN(command, 0);
        CHECK_EQ_S(text_of("weights_hash"), want);
    }
    RUN(BASE "--out $D/b --max_steps 2 --learning_rate 1e-3 --seed 7 "
             "--per_device_train_batch_size 2",
        0);
    CHECK(strcmp(text_of("weights_hash"), want) != 0);
    RUN(BASE "--out $D/b --max_steps 0", 0);
    CHECK_NEAR(number("step"), 0, 0);
    CHECK(exists("b/model.safetensors"));
    /* The seed of sampling. */
    RUN("$R generate --model $D/lm --prompt one --max_new_tokens 20 --seed 1", 0);
    char one[sizeof out];
    memcpy(one, out, sizeof out);
    RUN("$R generate --model $D/lm --prompt one --max_new_tokens 20 --seed 1 --batch-size 3", 0);
    CHECK_EQ_S(out, one);
    RUN("$R generate --model $D/lm --prompt one --max_new_tokens 20 --seed 2", 0);
    CHECK(strcmp(out, one) != 0);
}

TEST(config_file) {
    NEED_PROGRAM();
    REQUIRE(setup());
    test_write("c.json", "{\"learning_rate\": 0.001, \"max_steps\": 2, \"shuffle_dataset\": false,"
                         "\"lr_scheduler_type\": \"cosine\"}");
    RUN(BASE "--out $D/a --max_steps 2 --learning_rate 1e-3 --shuffle_dataset false "
             "--lr_scheduler_type cosine",
        0);
    char want[32];
    snprintf(want, sizeof want, "%s", text_of("weights_hash"));
    RUN(BASE "--out $D/b --config $D/c.json", 0);
    CHECK_EQ_S(text_of("weights_hash"), want);
    RUN(BASE "--config $D/c.json --out $D/b --max_steps 1", 0); /* the command line wins */
    CHECK_NEAR(number("step"), 1, 0);
    RUN(BASE "--max_steps 1 --config $D/c.json --out $D/b", 0);
    CHECK_NEAR(number("step"), 1, 0);
    /* Of an option that is there twice the last one counts. */
    RUN(BASE "--max_steps 2 --out $D/none --max-steps 1 --config $D/c.json --out $D/b", 0);
    CHECK_NEAR(number("step"), 1, 0);
    CHECK(!exists("none"));
    test_write("d.json", "{\"learning-rte\": 1}");
    REFUSE(BASE "--out $D/out --config $D/d.json", 2, "learning-rte", "learning_rate", NULL);
    test_write("d.json", "{\"learning_rate\": \"high\"}");
    REFUSE(BASE "--out $D/out --config $D/d.json", 2, "learning_rate", "high", NULL);
    test_write("d.json", "{\"learning_rate\": [1]}");
    REFUSE(BASE "--out $D/out --config $D/d.json", 1, "d.json", "learning_rate", NULL);
    test_write("d.json", "{\"optim_args\": {\"a\": 1}}");
    REFUSE(BASE "--out $D/out --config $D/d.json", 1, "d.json", "optim_args", NULL);
    /* As TRL says it: other names, null for what is not set, lists, what happens anyway. */
    test_write("d.json", "{\"dataset_name\": \"none\", \"packing\": false, \"eval_strategy\": null,"
                         "\"report_to\": [\"tensorboard\"], \"max_steps\": 1}");
    RUN(BASE "--out $D/b --config $D/d.json", 0);
    test_write("d.json", "{\"packing\": true}");
    REFUSE(BASE "--out $D/out --config $D/d.json", 2, "--packing", "without padding", NULL);
    REFUSE(BASE "--out $D/out --optim lion", 2, "--optim", "AdamW", NULL);
    REFUSE(BASE "--out $D/out --load-in-4bit --quiet", 2, "--load-in-4bit", "quantised", NULL);
    REFUSE(BASE "--out $D/out --report_to wandb", 2, "--report_to", "TensorBoard", NULL);
    test_write("d.json", "{\n\"learning_rate\": 1,\n}");
    REFUSE(BASE "--out $D/out --config $D/d.json", 1, "d.json:3", NULL, NULL);
    test_write("d.json", "{\"json\": false, \"quiet\": true, \"max_steps\": 0}");
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/b --config $D/d.json", 0);
    CHECK(!strchr(out, '{') && !*err);
    REFUSE(BASE "--json=perhaps --out $D/out", 2, "--json", "perhaps", NULL);
    test_write("d.json", "[1]");
    REFUSE(BASE "--out $D/out --config $D/d.json", 1, "d.json", "object", NULL);
    REFUSE(BASE "--out $D/out --config $D/none.json", 1, "none.json", NULL, NULL);
    /* All of a command line can stand in it. */
    char text[2048], here[512];
    snprintf(here, sizeof here, "%s", test_dir());
    snprintf(text, sizeof text,
             "{\"model\":\"%s/lm\",\"data\":\"%s/text.jsonl\",\"out\":\"%s/c\",\"max_steps\":2,"
             "\"learning_rate\":0.001,\"shuffle_dataset\":false,\"lr_scheduler_type\":\"cosine\","
             "\"json\":true}",
             here, here, here);
    test_write("e.json", text);
    RUN("$R sft --config $D/e.json", 0);
    CHECK_EQ_S(text_of("weights_hash"), want);
}

/* ---- data ------------------------------------------------------------------------------------ */

TEST(containers_of_records) {
    NEED_PROGRAM();
    REQUIRE(setup());
    RUN(BASE "--out $D/a --max_steps 2", 0);
    char want[32];
    snprintf(want, sizeof want, "%s", text_of("weights_hash"));
    RUN("gzip -c <$D/text.jsonl >$D/text.jsonl.gz; $R sft --model $D/lm --data $D/text.jsonl.gz "
        "--json --quiet --out $D/b --max_steps 2",
        0);
    CHECK_EQ_S(text_of("weights_hash"), want);
    RUN("{ echo '['; sed '$!s/$/,/' $D/text.jsonl; echo ']'; } >$D/text.json; "
        "$R sft --model $D/lm --data $D/text.json --json --quiet --out $D/b --max_steps 2",
        0);
    CHECK_EQ_S(text_of("weights_hash"), want);
}

/* What a stage would read, without reading weights or writing anything. */
TEST(dry_runs) {
    NEED_PROGRAM();
    REQUIRE(setup());
    test_write("mixed.jsonl",
               "{\"prompt\":\"one\",\"completion\":\" two\",\"label\":false}\n"
               "{\"prompt\":\"one\",\"completion\":\" and\\u001b[2J\\u009b\",\"label\":true}\n"
               "{\"text\":\"xyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyz\"}\n"
               "{\"conversations\":[{\"from\":\"human\",\"value\":\"one\"},{\"from\":\"gpt\","
               "\"value\":\"two\"}]}\n");
    RUN("rm $D/lm/model.safetensors; $R sft --model $D/lm --data $D/mixed.jsonl --dry_run --json "
        "--out $D/out --eval_data $D/text.jsonl",
        0);
    CHECK(strstr(out, "one[[ and\\x1b[2J\\xc2\\x9b<|endoftext|>]]") != NULL);
    CHECK(strstr(out, "Human: one\n\nAssistant:[[ two<|endoftext|>]]") != NULL);
    CHECK(strstr(out, "example 1: ") != NULL);
    CHECK(strstr(err, "mixed.jsonl:1: dropped: labelled false") != NULL);
    CHECK(strstr(err, "mixed.jsonl:3: dropped: ") && strstr(err, "max_length is 48"));
    CHECK_NEAR(number("records"), 2, 0);
    CHECK_NEAR(number("dropped"), 2, 0);
    CHECK_NEAR(number("dropped_labelled_false"), 1, 0);
    CHECK_NEAR(number("dropped_too_long"), 1, 0);
    CHECK_NEAR(number("eval_records"), 5, 0);
    CHECK_NEAR(number("max_length"), 48, 0);
    CHECK(!exists("out"));
    RUN("$R rm --model $D/lm --data $D/pairs.jsonl --dry-run", 0);
    CHECK(strstr(out, "example 1, chosen") && strstr(out, "one and one is[[ two<|endoftext|>]]"));
    CHECK(strstr(out, "example 1, rejected") && strstr(out, "one and one is[[ nine"));
    RUN("$R ppo --model $D/lm --data $D/prompts.jsonl --response_length 8 --dry_run", 0);
    CHECK(strstr(out, "the cat\n") != NULL);
    REFUSE("$R ppo --model $D/lm --data $D/prompts.jsonl --response_length 48 --dry_run", 1,
           "no room", NULL, NULL);
    REFUSE("$R sft --model $D/lm --data $D/none.jsonl --dry_run", 1, "none.jsonl", NULL, NULL);
}

/* Which judgements count, for all commands that read them. */
TEST(aspects_and_qualification) {
    NEED_PROGRAM();
    REQUIRE(setup());
    static const char text[] =
        "{\"prompt\":\"one\",\"answers\":[\" two\",\" nine\"],\"choice\":\"A\","
        "\"annotator\":\"a\",\"aspects\":{\"tone\":\"B\"}}\n"
        "{\"prompt\":\"two\",\"answers\":[\" two\",\" nine\"],\"choice\":\"B\","
        "\"annotator\":\"b\"}\n"
        "{\"prompt\":\"two\",\"answers\":[\" two\",\" nine\"],\"choice\":\"B\","
        "\"annotator\":\"c\",\"aspects\":{\"tone\":\"A\"},\"qualified\":false}\n";
    test_write("judged.jsonl", text);
    RUN("$R rm --model $D/lm --data $D/judged.jsonl --dry_run --json", 0);
    CHECK_NEAR(number("records"), 2, 0);
    CHECK_NEAR(number("dropped_unqualified"), 1, 0);
    CHECK(strstr(err, "judged.jsonl:3: dropped: by somebody not qualified") != NULL);
    RUN("$R rm --model $D/lm --data $D/judged.jsonl --dry_run --json --use_unqualified", 0);
    CHECK_NEAR(number("records"), 3, 0);
    RUN("$R rm --model $D/lm --data $D/judged.jsonl --dry_run --json --aspect tone", 0);
    CHECK_NEAR(number("records"), 1, 0);
    CHECK_NEAR(number("dropped_other_aspect"), 1, 0);
    CHECK(strstr(out, "one[[ nine") && strstr(err, "judged.jsonl:2: dropped: without the aspect"));
    RUN("$R rm --model $D/lm --data $D/judged.jsonl --out $D/tone --max_steps 1 --aspect tone "
        "--eval_data $D/judged.jsonl --normalize_samples 0 --json",
        0);
    CHECK_NEAR(number("records"), 1, 0);
    CHECK_NEAR(number("eval_pairs"), 1, 0);
    RUN("$R eval --model $D/tone --data $D/judged.jsonl --json --aspect tone --use_unqualified", 0);
    CHECK_NEAR(number("pairs"), 2, 0);
    RUN("$R raters --data $D/judged.jsonl --json --aspect tone", 0);
    CHECK_NEAR(number("judgements"), 1, 0);
    CHECK_NEAR(number("unqualified"), 1, 0);
    static const char *const commands[] = {"rm --model $D/lm --out $D/x", "eval --model $D/tone",
                                           "raters"};
    for (int i = 0; i < 3; i++) {
        char command[256];
        snprintf(command, sizeof command, "$R %s --data $D/judged.jsonl --aspect depth",
                 commands[i]);
        REFUSE(command, 1, "no record has the aspect \"depth\"; there are: tone", NULL, NULL);
    }
    /* Temperatures at the end, by annotator. */
    RUN("$R rm --model $D/lm --data $D/judged.jsonl --out $D/warm --max_steps 2 "
        "--annotator_temperatures --normalize_samples 0",
        0);
    CHECK(strstr(out, "\nannotator_temperatures ") && strstr(out, "\nb ") && !strstr(out, "\nc "));
    CHECK(exists("warm/annotators.json"));
}

/* The same slices from `rlhf eval` and, in eval.json, from `rlhf rm`: refusal and harmlessness
 * apart, conversations also turn by turn. */
TEST(slices_of_rm_and_eval) {
    NEED_PROGRAM();
    REQUIRE(setup());
    test_write(
        "cut.jsonl",
        "{\"prompt\":\"one and one is\",\"chosen\":\" two\",\"rejected\":\" nine\",\"domain\":"
        "\"sums\",\"annotator\":\"a\",\"annotator_type\":\"expert\",\"culture\":\"x\",\"safety\":"
        "{\"refusal\":true,\"harmless\":true}}\n{\"prompt\":\"the cat\",\"chosen\":\" sat\","
        "\"rejected\":\" on\",\"culture\":\"y\",\"annotator\":\"b\",\"safety\":{\"refusal\":false,"
        "\"harmless\":true}}\n{\"chosen\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":"
        "\"assistant\",\"content\":\"b\"},{\"role\":\"user\",\"content\":\"c\"},{\"role\":"
        "\"assistant\",\"content\":\"d\"}],\"rejected\":[{\"role\":\"user\",\"content\":\"a\"},"
        "{\"role\":\"assistant\",\"content\":\"e\"},{\"role\":\"user\",\"content\":\"c\"},"
        "{\"role\":\"assistant\",\"content\":\"f\"}],\"safety\":\"other\",\"era\":7}\n");
    RUN("$R rm --model $D/lm --data $D/cut.jsonl --eval_data $D/cut.jsonl --out $D/cut --max_steps "
        "3 --learning_rate 1e-3 --normalize_samples 0 --chat_template plain",
        0);
    RUN("$R eval --model $D/cut --data $D/cut.jsonl --slice era --per_turn --chat_template plain "
        "--json",
        0);
    static const struct {
        const char *field, *value;
        int pairs;
    } cut[] = {{"domain", "sums", 1},     {"annotator_type", "expert", 1}, {"annotator", "a", 1},
               {"annotator", "b", 1},     {"culture", "x", 1},             {"culture", "y", 1},
               {"safety", "refusal", 1},  {"safety", "harmless", 2},       {"safety", "other", 1},
               {"turns", "2", 1},         {"turns", "1", 2},               {"era", "7", 1},
               {"per_turn", "1", 1},      {"per_turn", "2", 1}};
    json_t *eval = last_json(), *rm = json_load_file(test_path("cut/eval.json"), 0, NULL);
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
        const json_t *a = json_object_get(json_object_get(eval, cut[i].field), cut[i].value),
                     *b = json_object_get(json_object_get(rm, cut[i].field), cut[i].value);
        if (json_integer_value(json_object_get(a, "pairs")) != cut[i].pairs)
            test_fail(__FILE__, __LINE__, "%s %s: %d pairs", cut[i].field, cut[i].value,
                      (int)json_integer_value(json_object_get(a, "pairs")));
        static const char *const keys[] = {"accuracy", "accuracy_low",    "accuracy_high", "margin",
                                           "ece",      "length_accuracy", "pairs"};
        for (size_t k = 0; k < sizeof keys / sizeof *keys; k++) {
            CHECK(json_is_number(json_object_get(a, keys[k])));
            if (i < 11)
                CHECK_NEAR(json_number_value(json_object_get(b, keys[k])),
                           json_number_value(json_object_get(a, keys[k])), 1e-6);
        }
    }
    CHECK(json_object_get(eval, "ceiling") && json_object_get(json_object_get(eval, "length"),
                                                              "short"));
    json_decref(eval), json_decref(rm);
}

/* ---- rlhf label, in a terminal --------------------------------------------------------------- */

/* The records of a file of JSON lines as a list. */
static json_t *records(const char *name) {
    FILE *f = fopen(test_path(name), "r");
    json_t *list = json_array(), *j;
    while (f && (j = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL))) json_array_append_new(list, j);
    if (f) fclose(f);
    return list;
}

static const char *member(const json_t *j, const char *key) {
    const char *text = json_string_value(json_object_get(j, key));
    return text ? text : "";
}

/* Answers of two checkpoints: each is stored with the model that gave it and how, from which it
 * comes again; the terminal names neither model. */
TEST(label_two_checkpoints) {
    NEED_PROGRAM();
    REQUIRE(setup());
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/new --max_steps 4 --learning_rate 1e-2",
        0);
    RUN("yes a | head -n 18 | $R label --model $D/lm --model2 $D/new --prompts $D/prompts.jsonl "
        "--out $D/p.jsonl --num_answers 4 --batch_size 4 --max_new_tokens 6 --temperature 0.9 "
        "--top_k 50 --tty --json",
        0);
    CHECK_NEAR(number("judgements"), 18, 0);
    CHECK(!strstr(out, "/lm") && !strstr(out, "/new"));
    REFUSE("$R label --model $D/lm --prompts $D/prompts.jsonl --out $D/q.jsonl --max_new_tokens 6 "
           "--tty --aspects style,depth,style",
           1, "--aspects", "\"style\" is there twice", NULL);
    json_t *list = records("p.jsonl"), *j;
    CHECK_EQ_I(json_array_size(list), 18);
    size_t i;
    int from[2] = {0}, mixed = 0, checked = 0;
    json_array_foreach(list, i, j) {
        const char *first = NULL;
        for (size_t k = 0; k < 2; k++) {
            const json_t *s = json_array_get(json_object_get(j, "sources"), k);
            const char *model = member(s, "model"),
                       *name = strrchr(model, '/') ? strrchr(model, '/') + 1 : "";
            CHECK(!strcmp(name, "lm") || !strcmp(name, "new"));
            from[!strcmp(name, "new")]++;
            if (first) mixed += strcmp(first, name) != 0;
            first = name;
            CHECK_NEAR(json_number_value(json_object_get(s, "temperature")), 0.9, 1e-12);
            CHECK_EQ_I(json_integer_value(json_object_get(s, "top_k")), 50);
            if (i >= 6) continue;
            /* The pairs of the first prompt: the same seed gives the same two answers. */
            char command[1024];
            CHECK_EQ_S(member(j, "prompt"), "one");
            snprintf(command, sizeof command,
                     "$R generate --model $D/%s --data $D/prompts.jsonl --max_new_tokens 6 "
                     "--temperature 0.9 --top_k 50 --num_return_sequences 2 --seed %lld --out "
                     "$D/again.jsonl; $R info --model $D/%s --json",
                     name, (long long)json_integer_value(json_object_get(s, "seed")), name);
            RUN(command, 0);
            CHECK_EQ_S(text_of("weights_hash"), member(s, "weights_hash"));
            json_t *again = records("again.jsonl");
            const json_t *same =
                json_array_get(again, (size_t)json_integer_value(json_object_get(s, "sample")));
            CHECK_EQ_S(member(same, "completion"),
                       json_string_value(json_array_get(json_object_get(j, "answers"), k)));
            json_decref(again);
            checked++;
        }
    }
    /* Of four answers two are each model's: of the six pairs four are of both. */
    CHECK(from[0] == 18 && from[1] == 18 && mixed == 12 && checked == 12);
    json_decref(list);
}

/* A newer checkpoint adds a round to the same file: only when that is asked for, once for each
 * checkpoint, also if it is asked for again, and the records say the round and the weights. */
TEST(label_rounds) {
    NEED_PROGRAM();
    REQUIRE(setup());
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/new --max_steps 4 --learning_rate 1e-2",
        0);
#define ROUND                                                                                      \
    "$R label --prompts $D/prompts.jsonl --out $D/p.jsonl --max_new_tokens 6 --tty --json "
    RUN("yes a | head -n 2 | " ROUND "--model $D/lm", 0);
    CHECK_NEAR(number("judgements"), 2, 0);
    RUN(ROUND "--model $D/new", 1);
    CHECK(strstr(err, "its answers are from other weights") && strstr(err, "--continue"));
    RUN("yes b | head -n 9 | " ROUND "--model $D/new --continue", 0);
    CHECK_NEAR(number("items"), 6, 0);
    CHECK_NEAR(number("finished"), 6, 0);
    char *before = slurp(test_path("p.jsonl"), NULL);
    RUN("yes a | head -n 9 | " ROUND "--model $D/new --continue", 0);
    CHECK_NEAR(number("judgements"), 6, 0);
    char *after = slurp(test_path("p.jsonl"), NULL);
    CHECK_EQ_S(after, before);
    free(before), free(after);
    json_t *list = records("p.jsonl"), *j;
    size_t i;
    int rounds[3] = {0};
    json_array_foreach(list, i, j) {
        int round = (int)json_integer_value(json_object_get(j, "round"));
        const char *model = member(json_array_get(json_object_get(j, "sources"), 0), "model");
        CHECK(round == 1 || round == 2);
        rounds[round == 2]++;
        CHECK(strstr(model, round == 1 ? "/lm" : "/new") != NULL);
    }
    CHECK(rounds[0] == 3 && rounds[1] == 3);
    json_decref(list);
    RUN("$R rm --model $D/lm --data $D/p.jsonl --dry_run --json", 0);
    CHECK_NEAR(number("records"), 6, 0);
#undef ROUND
}

/* With a reward model the pairs come by the difference of its scores, the smallest first. */
TEST(label_most_uncertain_first) {
    NEED_PROGRAM();
    REQUIRE(setup_rm());
    RUN("for i in one two three four five six seven eight; do for k in nine ten cat; do echo "
        "'{\"prompt\":\"one and one is\",\"answers\":[\" '$i' '$k'\",\" '$k' '$i' '$i'\"]}'; "
        "done; done >$D/given.jsonl",
        0);
    RUN("yes a | head -n 24 | $R label --pairs $D/given.jsonl --reward $D/rm --out $D/p.jsonl "
        "--tty --json",
        0);
    CHECK_NEAR(number("judgements"), 24, 0);
    json_t *list = records("p.jsonl"), *given = records("given.jsonl"), *j;
    FILE *f = fopen(test_path("texts.jsonl"), "w");
    size_t i;
    int moved = 0;
    json_array_foreach(list, i, j) {
        json_t *answers = json_object_get(j, "answers");
        moved += !json_equal(answers, json_object_get(json_array_get(given, i), "answers"));
        for (size_t k = 0; k < 2; k++)
            fprintf(f, "{\"prompt\":\"one and one is\",\"completion\":\"%s\"}\n",
                    json_string_value(json_array_get(answers, k)));
    }
    fclose(f);
    CHECK(moved > 0);
    json_decref(list), json_decref(given);
    RUN("$R score --model $D/rm --data $D/texts.jsonl --out $D/scores.jsonl", 0);
    list = records("scores.jsonl");
    CHECK_EQ_I(json_array_size(list), 48);
    double last = 0;
    for (i = 0; i < json_array_size(list); i += 2) {
        double a = json_number_value(json_object_get(json_array_get(list, i), "score")),
               b = json_number_value(json_object_get(json_array_get(list, i + 1), "score"));
        CHECK(fabs(a - b) >= last - 1e-5);
        last = fabs(a - b);
    }
    CHECK(last > 1e-4);
    json_decref(list);
}

/* Texts that people write, over a model's draft: `rlhf sft` learns from the file as it is, and what
 * was skipped is not learned. */
TEST(label_demonstrations) {
    NEED_PROGRAM();
    REQUIRE(setup());
    test_write("asked.jsonl",
               "{\"prompt\":\"one\",\"domain\":\"sums\"}\n{\"prompt\":[{\"role\":\"user\","
               "\"content\":\"the cat\"},{\"role\":\"assistant\",\"content\":\"sat\"},{\"role\":"
               "\"user\",\"content\":\"on\"}],\"domain\":\"cats\"}\n{\"prompt\":\"how much\"}\n");
    test_write("people.json", "[{\"name\":\"ann\",\"kind\":\"expert\"}]");
    RUN("printf ' two\\nthree\\n.\\nthe mat\\n.\\ns\\n' | $R label --task write --draft --model "
        "$D/lm --prompts $D/asked.jsonl --out $D/w.jsonl --annotators $D/people.json --annotator "
        "ann --max_new_tokens 6 --tty --json",
        0);
    CHECK_NEAR(number("judgements"), 3, 0);
    json_t *list = records("w.jsonl"), *asked = records("asked.jsonl"), *j;
    size_t i;
    json_array_foreach(list, i, j) {
        static const char *const texts[] = {" two\nthree", "the mat", ""};
        CHECK_EQ_S(member(j, "completion"), texts[i]);
        CHECK(json_equal(json_object_get(j, "prompt"),
                         json_object_get(json_array_get(asked, i), "prompt")));
        CHECK_EQ_S(member(j, "annotator"), "ann");
        CHECK_EQ_S(member(j, "annotator_type"), "expert");
        CHECK_EQ_S(member(j, "domain"), member(json_array_get(asked, i), "domain"));
        CHECK(json_is_string(json_object_get(j, "draft")));
        CHECK(strstr(member(json_array_get(json_object_get(j, "sources"), 0), "model"), "/lm"));
    }
    json_decref(list), json_decref(asked);
    RUN("$R sft --model $D/lm --data $D/w.jsonl --dry_run --json", 0);
    CHECK(strstr(out, "one[[ two\nthree<|endoftext|>]]") && strstr(out, "on\n"));
    CHECK(strstr(out, "[[ the mat<|endoftext|>]]") != NULL);
    CHECK_NEAR(number("dropped_labelled_false"), 1, 0);
    RUN("$R sft --model $D/lm --data $D/w.jsonl --out $D/shown --max_steps 1 --json", 0);
    CHECK_NEAR(number("records"), 2, 0);
}

/* Who had the gold item wrong (that neither answer is right is never the truth) is not learned
 * from, by rm and by raters, unless that is asked for. */
TEST(label_vetting) {
    NEED_PROGRAM();
    REQUIRE(setup());
    test_write("gold.jsonl",
               "{\"prompt\":\"two\",\"chosen\":\" three\",\"rejected\":\" one\",\"domain\":"
               "\"sums\"}\n");
    RUN("head -n 1 $D/pairs.jsonl >$D/one.jsonl; printf 'n\\na\\nb\\n' | $R label --pairs "
        "$D/one.jsonl --gold $D/gold.jsonl --qualify 1:1 --out $D/p.jsonl --tty --json",
        0);
    CHECK_NEAR(number("judgements"), 2, 0);
    CHECK_NEAR(number("finished"), 0, 0);
    REFUSE("$R rm --model $D/lm --data $D/p.jsonl --out $D/out --json", 1,
           "by somebody not qualified", NULL, NULL);
    RUN("$R rm --model $D/lm --data $D/p.jsonl --dry_run --json --use_unqualified", 0);
    CHECK_NEAR(number("records"), 1, 0);
    RUN("$R label --pairs $D/one.jsonl --gold $D/gold.jsonl --qualify 1:1 --out $D/p.jsonl "
        "--annotator bob --tty --json",
        0);
    CHECK(strstr(out, "==== 1 of 2") != NULL);
    REFUSE("$R raters --data $D/p.jsonl", 1, "no judgements of somebody qualified", NULL, NULL);
    RUN("$R raters --data $D/p.jsonl --use_unqualified --json", 0);
    CHECK_NEAR(number("judgements"), 2, 0);
}

/* Stopped by the end of its input, it goes on with what is left; undo reaches behind the stop. */
TEST(label_goes_on) {
    NEED_PROGRAM();
    REQUIRE(setup());
#define ON "$R label --pairs $D/pairs.jsonl --out $D/p.jsonl --tty --json"
    RUN("printf 'a2\\nb\\n' | " ON, 0);
    CHECK_NEAR(number("judgements"), 2, 0);
    json_t *before = records("p.jsonl");
    RUN("printf 'u\\nt\\n' | " ON, 0);
    CHECK(strstr(out, "==== 3 of 3") && strstr(out, "==== 2 of 3"));
    CHECK_NEAR(number("judgements"), 2, 0);
    json_t *after = records("p.jsonl");
    CHECK(json_equal(json_array_get(before, 0), json_array_get(after, 0)));
    CHECK_EQ_S(member(json_array_get(after, 1), "choice"), "tie");
    CHECK_EQ_S(member(json_array_get(after, 1), "prompt"),
               member(json_array_get(before, 1), "prompt"));
    json_decref(before), json_decref(after);
    RUN("yes wrong | head -n 3 | " ON, 0);
    CHECK(strstr(out, "not understood") != NULL);
    RUN("echo a | " ON, 0);
    CHECK_NEAR(number("finished"), 3, 0);
#undef ON
    /* Killed while it kept what it had sampled: half a line of that is sampled again. */
#define ON                                                                                         \
    "$R label --model $D/lm --prompts $D/prompts.jsonl --out $D/s.jsonl --max_new_tokens 6 --tty"
    RUN("printf 'a\\nb\\n' | " ON " && cp $D/s.jsonl.items $D/whole && truncate -s -30 "
        "$D/s.jsonl.items && echo a | " ON " --json",
        0);
    CHECK_NEAR(number("items"), 3, 0);
    CHECK_NEAR(number("finished"), 3, 0);
    CHECK(same_files("s.jsonl.items", "whole"));
#undef ON
}

TEST(long_records_are_counted) {
    NEED_PROGRAM();
    REQUIRE(setup());
    test_write("long.jsonl",
               "{\"text\":\"one\"}\n{\"text\":\"xyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyzxyz"
               "xyzxyzxyzxyzxyzxyzxyzxyz\"}\n{\"text\":\"two\"}\n");
    RUN("$R sft --model $D/lm --data $D/long.jsonl --out $D/a --max_steps 1 --json", 0);
    CHECK_NEAR(number("dropped"), 1, 0);
    CHECK_NEAR(number("records"), 2, 0);
    CHECK(strstr(err, "warning: ") && strstr(err, "long.jsonl: 1 of 3"));
    REFUSE("$R sft --model $D/lm --data $D/long.jsonl --out $D/out --max_length 1", 1,
           "long.jsonl", "longer", NULL);
}

TEST(bad_records) {
    NEED_PROGRAM();
    REQUIRE(setup_rm());
    static const struct {
        const char *line, *say, *more;
    } sft[] = {{"{\"txt\":\"a\"}", "bad.jsonl:2", "\"text\""},
               {"{\"text\":\"a\"", "bad.jsonl:2: bad JSON", NULL},
               {"{\"text\":3}", "bad.jsonl:2", "\"text\": found 3"},
               {"{\"prompt\":\"a\"}", "bad.jsonl:2", "completion"},
               {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", "bad.jsonl:2",
                "assistant"}};
    for (size_t i = 0; i < sizeof sft / sizeof *sft; i++) {
        char text[512];
        snprintf(text, sizeof text, "{\"text\":\"fine\"}\n%s\n", sft[i].line);
        test_write("bad.jsonl", text);
        REFUSE("$R sft --model $D/lm --data $D/bad.jsonl --out $D/out", 1, sft[i].say, sft[i].more,
               NULL);
        REFUSE("$R sft --model $D/lm --data $D/text.jsonl --eval_data $D/bad.jsonl --out $D/out", 1,
               sft[i].say, sft[i].more, NULL);
        REFUSE("$R eval --model $D/lm --data $D/bad.jsonl", 1, sft[i].say, sft[i].more, NULL);
        REFUSE("$R score --model $D/rm --data $D/bad.jsonl", 1, sft[i].say, sft[i].more, NULL);
    }
    test_write("bad.jsonl", "\n\n{\"prompt\":\"a\",\"chosen\":\"b\"}\n");
    REFUSE("$R rm --model $D/lm --data $D/bad.jsonl --out $D/out", 1, "bad.jsonl:3",
           "missing \"rejected\"", NULL);
    test_write("bad.jsonl", "{\"text\":\"a\"}\n");
    REFUSE("$R ppo --model $D/lm --reward $D/rm --data $D/bad.jsonl --out $D/out "
           "--response_length 4",
           1, "bad.jsonl:1", "missing \"prompt\"", NULL);
    REFUSE("$R generate --model $D/lm --data $D/bad.jsonl --out $D/out", 1, "bad.jsonl:1",
           "missing \"prompt\"", NULL);
    test_write("bad.jsonl", "");
    REFUSE("$R sft --model $D/lm --data $D/bad.jsonl --out $D/out", 1, "bad.jsonl: no records",
           NULL, NULL);
    REFUSE("$R sft --model $D/lm --data $D/none.jsonl --out $D/out", 1, "none.jsonl",
           "No such file", NULL);
    RUN("gzip -c <$D/text.jsonl | head -c 60 >$D/cut.jsonl.gz", 0);
    REFUSE("$R sft --model $D/lm --data $D/cut.jsonl.gz --out $D/out", 1, "cut.jsonl.gz",
           "damaged or cut short", NULL);
    REFUSE("$R sft --model $D/lm --data $D/text.jsonl --out $D/out --chat_template klingon", 1,
           "klingon", "chatml", NULL);
}

/* ---- models ---------------------------------------------------------------------------------- */

/* $D/bad becomes the golden GPT-2 model with a changed header (edit: from one text to another, of
 * any length) and, if cut is not 0, without its last bytes. */
static void break_model(const char *from, const char *to, int cut) {
    size_t len;
    char *file = slurp("test/golden/gpt2/model.safetensors", &len);
    REQUIRE(file != NULL);
    uint64_t head = 0;
    memcpy(&head, file, 8);
    char *header = malloc((size_t)head + 1);
    memcpy(header, file + 8, (size_t)head);
    header[head] = 0;
    RUN("rm -rf $D/bad; mkdir $D/bad; cp test/golden/gpt2/*.json $D/tok/*.json $D/bad", 0);
    FILE *f = fopen(test_path("bad/model.safetensors"), "wb");
    REQUIRE(f != NULL);
    char *at = from ? strstr(header, from) : header;
    if (!at) test_fail(__FILE__, __LINE__, "the header has no %s", from);
    size_t skip = from ? strlen(from) : 0, put = from ? strlen(to) : 0;
    uint64_t size = head - skip + put;
    fwrite(&size, 1, 8, f);
    if (at) {
        fwrite(header, 1, (size_t)(at - header), f);
        if (put) fwrite(to, 1, put, f);
        fwrite(at + skip, 1, (size_t)head - skip - (size_t)(at - header), f);
    }
    fwrite(file + 8 + head, 1, len - 8 - (size_t)head - (size_t)cut, f);
    fclose(f);
    free(header);
    free(file);
}

#define BAD_SFT "$R sft --model $D/bad --tokenizer $D/tok --data $D/text.jsonl --out $D/out"

TEST(bad_weights) {
    NEED_PROGRAM();
    REQUIRE(setup());
    break_model(NULL, NULL, 0);
    RUN("$R info --model $D/bad", 0);
    break_model(NULL, NULL, 100);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "truncated", NULL);
    REFUSE("$R info --model $D/bad", 1, "bad/model.safetensors", "truncated", NULL);
    RUN("head -c 500 test/golden/gpt2/model.safetensors >$D/bad/model.safetensors", 0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "truncated", NULL);
    RUN(": >$D/bad/model.safetensors", 0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "not a safetensors file", NULL);
    RUN("printf '\\377\\377\\377\\377\\377\\377\\377\\377{}' >$D/bad/model.safetensors", 0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "not a safetensors file", NULL);
    RUN("printf '\\4\\0\\0\\0\\0\\0\\0\\0abcd' >$D/bad/model.safetensors", 0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "JSON", NULL);
    RUN("printf '\\2\\0\\0\\0\\0\\0\\0\\0[]' >$D/bad/model.safetensors", 0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "object", NULL);

    size_t len;
    char *file = slurp("test/golden/gpt2/model.safetensors", &len);
    char *name = strstr(file + 8, "ln_f.weight\""), from[256] = "", to[300], *end;
    REQUIRE(name && (end = strchr(name, '}')));
    snprintf(from, sizeof from, "%.*s", (int)(end - name), name);
    long long a = 0, b = 0;
    REQUIRE(strstr(from, "offsets\":[") &&
            sscanf(strstr(from, "offsets\":[") + 10, "%lld,%lld", &a, &b) == 2);
    free(file);
#define ENTRY(dtype, shape, lo, hi)                                                                \
    snprintf(to, sizeof to,                                                                        \
             "ln_f.weight\":{\"dtype\":\"" dtype "\",\"shape\":" shape                             \
             ",\"data_offsets\":[%lld,%lld]",                                                      \
             lo, hi);                                                                              \
    break_model(from, to, 0)
    ENTRY("I32", "[32]", a, b);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", "I32");
    ENTRY("Q7", "[32]", a, b);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", "Q7");
    ENTRY("F32", "[31]", a, b);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", NULL);
    ENTRY("F16", "[64]", a, b);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", "[64]");
    ENTRY("F32", "[8,4]", a, b);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", "expected [32]");
    ENTRY("F32", "[32]", a - 128, b - 128);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "overlap", NULL);
    ENTRY("F32", "[32]", 100000000LL, 100000128LL);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", "data_offsets");
    ENTRY("F32", "[32]", -128LL, 0LL);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", "data_offsets");
    ENTRY("F32", "[9223372036854775807,9223372036854775807]", a, b);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", NULL);
    break_model("ln_f.weight\"", "ln_g.weight\"", 0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "ln_f.weight", "missing");
    break_model("{", "{\"transformer.extra\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":"
                     "[0,0]},",
                0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors", "unexpected", "transformer.extra");
}

TEST(bad_model_directories) {
    NEED_PROGRAM();
    REQUIRE(setup());
    REFUSE("$R info --model $D/none", 1, "none", "directory", NULL);
    RUN("mkdir $D/bad; cp $D/tok/*.json $D/bad", 0);
    REFUSE(BAD_SFT, 1, "bad/config.json", "No such file", NULL);
    RUN("cp test/golden/gpt2/config.json $D/bad", 0);
    REFUSE(BAD_SFT, 1, "bad: ", "no model.safetensors", NULL);
    RUN(": >$D/bad/pytorch_model.bin", 0);
    REFUSE(BAD_SFT, 1, "bad: ", "pytorch_model.bin", "safe_serialization=True");
    RUN("rm $D/bad/pytorch_model.bin; : >$D/bad/model.safetensors.index.json", 0);
    REFUSE(BAD_SFT, 1, "bad/model.safetensors.index.json", "JSON", NULL);
    RUN("rm $D/bad/model.safetensors.index.json; cp test/golden/gpt2/model.safetensors $D/bad", 0);
    RUN("$R info --model $D/bad", 0);
    static const struct {
        const char *config, *say, *more;
    } cases[] = {
        {"{\"model_type\":\"mamba\",\"vocab_size\":97}", "mamba", "gpt2"},
        {"{\"vocab_size\":97}", "missing \"model_type\"", NULL},
        {"{\"model_type\":\"gpt2\",\n\"vocab_size\":97,\n}", "config.json:3: bad JSON", NULL},
        {"{\"model_type\":\"gpt2\",\"vocab_size\":\"many\"}", "\"vocab_size\": found \"many\"",
         NULL},
        {"{\"model_type\":\"gpt2\",\"vocab_size\":-1}", "\"vocab_size\": found -1", NULL},
        {"{\"model_type\":\"gpt2\",\"vocab_size\":97,\"n_embd\":32,\"n_layer\":2,\"n_head\":5,"
         "\"n_positions\":64}",
         "n_head", NULL},
        {"{\"model_type\":\"gpt2\",\"vocab_size\":97,\"n_embd\":32,\"n_layer\":2,\"n_head\":4,"
         "\"n_positions\":64,\"n_inner\":52,\"activation_function\":\"relu\"}",
         "relu", "gelu_new"},
        {"{\"model_type\":\"gpt2\",\"vocab_size\":98,\"n_embd\":32,\"n_layer\":2,\"n_head\":4,"
         "\"n_positions\":64,\"n_inner\":52}",
         "shape", "[98,32]"},
        {"{\"model_type\":\"gpt2\",\"vocab_size\":97,\"n_embd\":32,\"n_layer\":3,\"n_head\":4,"
         "\"n_positions\":64,\"n_inner\":52}",
         "h.2.", "missing"},
        {"{\"model_type\":\"gpt2\",\"vocab_size\":97,\"n_embd\":32,\"n_layer\":1,\"n_head\":4,"
         "\"n_positions\":64,\"n_inner\":52}",
         "h.1.", "unexpected"},
        {"[]", "config.json", NULL},
        {"{\"model_type\":\"llama\",\"vocab_size\":97,\"hidden_size\":32,\"num_hidden_layers\":2,"
         "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"intermediate_size\":52,"
         "\"max_position_embeddings\":64,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4}}",
         "yarn", NULL}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_write("bad/config.json", cases[i].config);
        REFUSE(BAD_SFT, 1, "bad/", cases[i].say, cases[i].more);
    }
}

TEST(bad_tokenizers) {
    NEED_PROGRAM();
    REQUIRE(setup());
    REFUSE("$R sft --model test/golden/gpt2 --data $D/text.jsonl --out $D/out", 1,
           "test/golden/gpt2", "tokenizer", NULL);
    RUN("mkdir $D/bad; echo '{\"model\":{\"type\":\"WordPiece\"}}' >$D/bad/tokenizer.json", 0);
    REFUSE("$R tokenize --tokenizer $D/bad", 1, "bad/tokenizer.json", "WordPiece", NULL);
    RUN("echo '{\"model\":' >$D/bad/tokenizer.json", 0);
    REFUSE("$R tokenize --tokenizer $D/bad", 1, "bad/tokenizer.json", "bad JSON", NULL);
    /* A tokenizer with more entries than the model has rows: its ids are out of range. */
    REFUSE("$R sft --model test/golden/gpt2 --tokenizer $D/tok --data $D/text.jsonl --out $D/out",
           1, "token id", "97", NULL);
    REFUSE("$R generate --model test/golden/gpt2 --tokenizer $D/tok --prompt 'the cat'", 1,
           "token id", "97", NULL);
}

TEST(wrong_kinds_of_models) {
    NEED_PROGRAM();
    REQUIRE(setup_rm());
    REFUSE("$R sft --model $D/rm --data $D/text.jsonl --out $D/out", 1, "reward model",
           "language model", NULL);
    REFUSE("$R score --model $D/lm --data $D/text.jsonl", 1, "language model", "reward model",
           NULL);
    REFUSE("$R generate --model $D/rm --prompt one", 1, "reward model", NULL, NULL);
    REFUSE("$R eval --model $D/rm --data $D/text.jsonl --type text", 1, "reward model", NULL, NULL);
    REFUSE("$R ppo --model $D/lm --reward $D/lm --data $D/prompts.jsonl --out $D/out "
           "--response_length 4",
           1, "reward model", NULL, NULL);
    REFUSE("$R ppo --model $D/rm --reward $D/rm --data $D/prompts.jsonl --out $D/out "
           "--response_length 4",
           1, "language model", NULL, NULL);
    /* A scorer without a trained head. */
    RUN("mkdir $D/raw; cp $D/lm/model.safetensors $D/lm/tok*.json $D/raw; sed "
        "s/LlamaForCausalLM/LlamaForSequenceClassification/ $D/lm/config.json "
        ">$D/raw/config.json",
        0);
    REFUSE("$R score --model $D/raw --data $D/text.jsonl", 1, "never trained", NULL, NULL);
    REFUSE("$R eval --model $D/raw --data $D/pairs.jsonl", 1, "never trained", NULL, NULL);
    REFUSE("$R ppo --model $D/lm --reward $D/raw --data $D/prompts.jsonl --out $D/out "
           "--response_length 4",
           1, "never trained", NULL, NULL);
}

TEST(context_overflow) {
    NEED_PROGRAM();
    REQUIRE(setup_rm());
#define LONG_PROMPT "$(printf '%060d' 7)"
    REFUSE("$R generate --model $D/lm --prompt " LONG_PROMPT, 1, "48 positions", NULL, NULL);
    RUN("echo '{\"prompt\":\"'" LONG_PROMPT "'\"}' >$D/long.jsonl", 0);
    REFUSE("$R ppo --model $D/lm --reward $D/rm --data $D/long.jsonl --out $D/out "
           "--response_length 4",
           1, "long.jsonl", "longer", NULL);
    REFUSE("$R ppo --model $D/lm --reward $D/rm --data $D/prompts.jsonl --out $D/out "
           "--response_length 100",
           1, NULL, NULL, NULL);
    RUN("echo '{\"text\":\"'" LONG_PROMPT "'\"}' >$D/long.jsonl", 0);
    REFUSE("$R eval --model $D/lm --data $D/long.jsonl", 1, "long.jsonl", "48 tokens", NULL);
    RUN("$R generate --model $D/lm --prompt one --max_new_tokens 500 --json", 0);
    CHECK(number("mean_length") < 48);
}

TEST(unwritable_places) {
    NEED_PROGRAM();
    REQUIRE(setup_rm());
    test_write("file", "in the way");
    static const char *const commands[] = {
        "$R sft --model $D/lm --data $D/text.jsonl --max_steps 1 --quiet --out $D/file",
        "$R sft --model $D/lm --data $D/text.jsonl --max_steps 1 --quiet --out $D/file/sub",
        "$R rm --model $D/lm --data $D/pairs.jsonl --max_steps 1 --quiet --out $D/file",
        ("$R ppo --model $D/lm --reward $D/rm --data $D/prompts.jsonl --max_steps 1 --quiet "
         "--response_length 4 --batch_size 2 --out $D/file"),
        "$R tokenizer --train $D/corpus.txt --vocab_size 260 --out $D/file/sub",
        "$R generate --model $D/lm --data $D/prompts.jsonl --out $D/file/sub",
        "$R score --model $D/rm --data $D/text.jsonl --out $D/file/sub"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        REFUSE(commands[i], 1, "/file", NULL, NULL);
    char *text = slurp(test_path("file"), NULL);
    CHECK_EQ_S(text, "in the way");
    free(text);
    REFUSE("$R info >/dev/full", 1, "standard output", NULL, NULL);
}

/* ---- interrupted runs ------------------------------------------------------------------------ */

static int count_lines(const char *name) {
    char *text = slurp(test_path(name), NULL);
    int n = 0;
    for (char *c = text; c && *c; c++) n += *c == '\n';
    free(text);
    return n;
}

/* Starts the program; what it prints goes to these, or where they are negative to $D/stdout and
 * $D/stderr. */
static pid_t start(char *const argv[], int in, int to, int log) {
    char paths[2][1024];
    snprintf(paths[0], sizeof paths[0], "%s/stdout", test_dir());
    snprintf(paths[1], sizeof paths[1], "%s/stderr", test_dir());
    for (int i = 0; i < 2; i++) unlink(paths[i]); /* what is found there later is this program's */
    pid_t pid = fork();
    if (pid) return pid;
    for (int i = 0; i < 2; i++) {
        int fd = open(paths[i], O_WRONLY | O_CREAT | O_TRUNC, 0666);
        int given = i ? log : to;
        if (fd < 0 || dup2(given < 0 ? fd : given, i + 1) < 0) _exit(99);
    }
    if (dup2(in, 0) < 0) _exit(99);
    execv(program(), argv);
    _exit(99);
}

/* Waits up to a minute; the exit code, 1000 + the signal, or -1 after killing it. */
static int wait_for(pid_t pid) {
    for (int i = 0; i < 6000; i++) {
        int status;
        if (waitpid(pid, &status, WNOHANG) == pid)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
        usleep(10000);
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return -1;
}

/* Interrupts a run when its metrics have five more lines, twice, resumes it each time, and compares
 * with a run that was left alone. What it says goes into a pipe of one page that is read only after
 * the signal: however late that comes, the run waits for it long before its end. */
static void interrupt(const char *command, const char *extra) {
    REQUIRE(setup_rm());
    char here[600], line[2048];
    snprintf(here, sizeof here, "%s", test_dir());
    snprintf(line, sizeof line, "$R %s %s --out $D/whole --quiet", command, extra);
    RUN(line, 0);
    char args[2048], *argv[64];
    int null = open("/dev/null", O_RDONLY);
    for (int round = 0; round < 2; round++) {
        int argc = 0, had = count_lines("cut/metrics.jsonl"), said[2];
        snprintf(args, sizeof args, "rlhf %s %s --out $D/cut%s", command, extra,
                 round ? " --resume" : "");
        static char words[64][700];
        for (char *word = strtok(args, " "); word; word = strtok(NULL, " ")) {
            char *name = strstr(word, "$D");
            if (name) snprintf(words[argc], sizeof words[0], "%s%s", here, name + 2);
            else snprintf(words[argc], sizeof words[0], "%s", word);
            argv[argc] = words[argc];
            argc++;
        }
        argv[argc] = NULL;
        REQUIRE(pipe2(said, O_CLOEXEC) == 0 && fcntl(said[1], F_SETPIPE_SZ, 4096) > 0);
        pid_t pid = start(argv, null, -1, said[1]);
        close(said[1]);
        for (int i = 0; i < 60000 && count_lines("cut/metrics.jsonl") < had + 5; i++) usleep(1000);
        kill(pid, SIGINT);
        FILE *f = fdopen(said[0], "r");
        err[fread(err, 1, sizeof err - 1, f)] = 0;
        fclose(f);
        int code = wait_for(pid);
        if (code != 130) test_fail(__FILE__, __LINE__, "exit code %d: %.300s", code, err);
        CHECK(strstr(err, "interrupted") && strstr(err, "--resume"));
        CHECK(exists("cut/checkpoint/trainer_state.json"));
        CHECK(!exists("cut/model.safetensors"));
    }
    close(null);
    snprintf(line, sizeof line, "$R %s %s --out $D/cut --resume", command, extra);
    RUN(line, 0);
    CHECK(strstr(err, "going on from step") != NULL);
    static const char *const files[] = {"model.safetensors", "metrics.jsonl", "config.json",
                                        "samples.jsonl", "best_of_n.json"};
    for (int i = 0; i < 5; i++) {
        char a[64], b[64];
        snprintf(a, sizeof a, "whole/%s", files[i]);
        snprintf(b, sizeof b, "cut/%s", files[i]);
        /* A reward model answers nothing, and only PPO measures the best of n. */
        int there = i < 3 || !strncmp(command, "ppo", 3) || (i == 3 && !strncmp(command, "sft", 3));
        CHECK_EQ_I(exists(a), there);
        if (there && !same_files(a, b)) test_fail(__FILE__, __LINE__, "%s and %s differ", a, b);
    }
    CHECK(count_lines("cut/metrics.jsonl") > 20);
}

TEST(interrupted_sft) {
    NEED_PROGRAM();
    interrupt("sft --model $D/lm --data $D/text.jsonl --eval_data $D/text.jsonl",
              "--max_steps 150 --logging_steps 1 --eval_steps 7 --learning_rate 1e-3 --threads 1");
}

TEST(interrupted_rm) {
    NEED_PROGRAM();
    interrupt("rm --model $D/lm --data $D/pairs.jsonl --normalize_samples 8 --response_length 6",
              "--max_steps 150 --logging_steps 1 --learning_rate 1e-3 --threads 1 --save_steps 9");
}

TEST(interrupted_ppo) {
    NEED_PROGRAM();
    interrupt("ppo --model $D/lm --reward $D/rm --data $D/prompts.jsonl --response_length 8 "
              "--best_of_n 4",
              "--max_steps 100 --batch_size 4 --kl_target 1 --kl_horizon 50 --learning_rate 1e-3 "
              "--threads 1");
}

/* A resumed run must be the same run. */
TEST(resume_of_another_run) {
    NEED_PROGRAM();
    REQUIRE(setup_rm());
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/run --max_steps 2 --save_steps 1", 0);
    RUN("rm $D/run/model.safetensors", 0);
    REFUSE("$R rm --model $D/lm --data $D/pairs.jsonl --out $D/run --max_steps 4 --resume --quiet",
           1, "trainer_state.json", "another run", NULL);
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/fresh --max_steps 2 --resume", 0);
    CHECK(strstr(err, "no state to go on from") != NULL);
}

/* Waiting for prompts on standard input can be interrupted too. */
TEST(interrupted_while_it_reads) {
    NEED_PROGRAM();
    REQUIRE(setup());
    char tok[600];
    snprintf(tok, sizeof tok, "%s/tok", test_dir());
    char *argv[] = {"rlhf", "tokenize", "--tokenizer", tok, NULL};
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    pid_t pid = start(argv, ends[0], -1, -1);
    usleep(500000);
    kill(pid, SIGINT);
    int code = wait_for(pid);
    if (code != 130 && code != 1000 + SIGINT)
        test_fail(__FILE__, __LINE__, "exit code %d (-1: it goes on reading)", code);
    close(ends[0]);
    close(ends[1]);
}

/* ---- adapters and conversations -------------------------------------------------------------- */

/* A merged adapter is a model that stands alone and computes the same. */
TEST(adapters_are_merged) {
    NEED_PROGRAM();
    REQUIRE(setup());
    RUN("$R sft --model $D/lm --data $D/text.jsonl --out $D/ad --use_peft --max_steps 9 "
        "--learning_rate 3e-2 --json", 0);
    REFUSE("$R export --model $D/lm --merge --out $D/out", 1, "lm", "no adapter", NULL);
    REFUSE("$R export --model $D/ad --merge --out $D/ad", 1, "ad", "holds an adapter", NULL);
    RUN("$R eval --model $D/lm --data $D/text.jsonl --json", 0);
    double base = number("nll");
    RUN("$R eval --model $D/ad --data $D/text.jsonl --json", 0);
    double nll = number("nll");
    RUN("$R export --model $D/ad --merge --out $D/merged --json", 0);
    char hash[64];
    snprintf(hash, sizeof hash, "%s", text_of("weights_hash"));
    CHECK(!exists("merged/adapter_config.json") && exists("merged/tokenizer.json"));
    RUN("$R export --model $D/ad --merge --out $D/half --save_dtype bf16", 0);
    RUN("grep -q bfloat16 $D/half/config.json", 0);
    RUN("mv $D/lm $D/gone", 0);
    RUN("$R info --model $D/merged --json", 0);
    CHECK_EQ_S(text_of("weights_hash"), hash);
    RUN("$R eval --model $D/merged --data $D/text.jsonl --json", 0);
    CHECK_NEAR(number("nll"), nll, 1e-5);
    CHECK(fabs(base - nll) > 1e-2);
    RUN("$R eval --model $D/half --data $D/text.jsonl --json", 0);
    CHECK_NEAR(number("nll"), nll, 5e-2);
}

/* A model that knows two answers by heart. Its chat template ends a turn with a token that is not
 * the model's end of text, and nothing is learnt of what may follow that. */
static bool setup_chat(void) {
    if (!setup()) return false;
    json_t *root = json_load_file(test_path("tok/tokenizer.json"), 0, NULL);
    static const char *const marks[] = {"<|im_start|>", "<|im_end|>"};
    for (int i = 0; i < 2; i++)
        json_array_append_new(json_object_get(root, "added_tokens"),
                              json_pack("{s:i,s:s,s:b}", "id", 300 + i, "content", marks[i],
                                        "special", 1));
    CHECK(json_dump_file(root, test_path("tok/tokenizer.json"), 0) == 0);
    json_decref(root);
    test_write("tok/chat_template.jinja", "<|im_start|> <|im_end|>");
    test_write("talks.jsonl",
               "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\","
               "\"content\":\"d\u00e9j\u00e0 \u20ac \U0001f600.\"},{\"role\":\"user\",\"content\":"
               "\"a\"},{\"role\":\"assistant\",\"content\":\"one\"}]}\n");
    test_write("asked.jsonl", "{\"prompt\":[{\"role\":\"user\",\"content\":\"a\"}]}\n");
    if (run("sed 's/:48,\"tie/:128,\"tie/' $D/config.json >$D/long.json && "
            "$R sft --init $D/long.json --tokenizer $D/tok --data $D/talks.jsonl --out $D/talker "
            "--max_steps 150 --learning_rate 1e-2 --json") != 0) {
        test_fail(__FILE__, __LINE__, "setup: %s", err);
        return false;
    }
    return true;
}

#define LEARNT "d\u00e9j\u00e0 \u20ac \U0001f600."

TEST(conversations) {
    NEED_PROGRAM();
    REQUIRE(setup_chat());
    /* The second turn knows of the first one; what /reset forgets is as if it had not been. */
    RUN("printf 'a\\na\\n\\n/reset\\na\\n' | $R chat --model $D/talker --temperature 0", 0);
    CHECK_EQ_S(out, LEARNT "\none\n" LEARNT "\n");
    CHECK_EQ_S(err, "");
    RUN("printf 'a\\r\\n/quit\\na\\n' | $R chat --model $D/talker --temperature 0 --json", 0);
    CHECK_NEAR(number("turns"), 1, 0);
    double tokens = number("tokens");
    RUN("printf 'a\\na\\n' | $R chat --model $D/talker --temperature 0 --max_steps 1", 0);
    CHECK_EQ_S(out, LEARNT "\n");
    /* An answer that is cut in the middle of a character ends before it. */
    RUN("printf a | $R chat --model $D/talker --temperature 0 --max_new_tokens 2", 0);
    CHECK_EQ_S(out, "d\n");
    CHECK(strstr(err, "cut at --max_new_tokens") != NULL);
    /* The end of a turn ends answers to conversations in files, too, and those of PPO. */
    RUN("$R generate --model $D/talker --data $D/asked.jsonl --temperature 0 --json", 0);
    CHECK(strstr(out, "\"finished\":true") && strstr(out, "\"completion\":\"" LEARNT "\""));
    CHECK_NEAR(number("mean_length"), tokens, 0);
    RUN("$R rm --model $D/talker --data $D/pairs.jsonl --out $D/rm --max_steps 1 --json "
        "--normalize_samples 4 --response_length 6", 0);
    RUN("$R ppo --model $D/talker --reward $D/rm --data $D/asked.jsonl --out $D/ppo --max_steps 1 "
        "--batch_size 2 --response_length 48 --temperature 0.1 --json", 0);
    CHECK_NEAR(number("val/num_eos_tokens"), 2, 0);
    CHECK_NEAR(number("val/ratio_first"), 1, 0);
    /* A system text, and what cannot be: found before anything is read. */
    RUN("printf 'a\\n' | $R chat --model $D/talker --system x --max_new_tokens 1", 0);
    REFUSE("$R chat --model $D/talker --chat_template gemma --system x", 1, "--system", "gemma",
           "system turn");
    REFUSE("$R chat --model $D/talker --chat_template klingon", 1, "klingon", "chatml", NULL);
    REFUSE("$R chat --model $D/rm", 1, "reward model", NULL, NULL);
    RUN("{ printf 'a\\n'; yes one | head -200 | tr '\\n' ' '; } | $R chat --model $D/talker", 1);
    CHECK(strstr(err, "positions") != NULL);
}

/* A transcript has no token that ends a turn: the user's next turn ends an answer, and is not
 * shown. */
TEST(conversations_as_transcripts) {
    NEED_PROGRAM();
    REQUIRE(setup());
    test_write("text.jsonl", "{\"text\":\"\\n\\nHuman: a\\n\\nAssistant: two\\n\\nHuman: a\\n\\n"
                             "Assistant: two\\n\\nHuman: a\\n\\nAssistant: two\"}\n");
    RUN("sed 's/:48,\"tie/:128,\"tie/' $D/config.json >$D/long.json", 0);
    RUN("$R sft --init $D/long.json --tokenizer $D/tok --data $D/text.jsonl --out $D/hh "
        "--max_steps 150 --learning_rate 1e-2", 0);
    RUN("printf 'a\\na\\n' | $R chat --model $D/hh --temperature 0", 0);
    CHECK_EQ_S(out, "two\ntwo\n");
    CHECK_EQ_S(err, "");
}

/* Each message of a packet socket is one write of the program: an answer comes before the input
 * ends, in parts, each of whole characters. */
TEST(answers_come_as_they_are_made) {
    NEED_PROGRAM();
    REQUIRE(setup_chat());
    char model[600], part[256], whole[1024] = "";
    snprintf(model, sizeof model, "%s/talker", test_dir());
    char *argv[] = {"rlhf", "chat", "--model", model, "--temperature", "0", NULL};
    int in[2], to[2], parts = 0;
    REQUIRE(pipe(in) == 0 && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, to) == 0);
    struct timeval patience = {.tv_sec = 60};
    fcntl(in[1], F_SETFD, FD_CLOEXEC);
    setsockopt(to[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    pid_t pid = start(argv, in[0], to[1], -1);
    CHECK(write(in[1], "a\n", 2) == 2);
    while (!strchr(whole, '\n')) {
        ssize_t n = recv(to[0], part, sizeof part - 1, 0);
        if (n <= 0) break;
        part[n] = 0;
        json_t *text = json_string(part); /* null if it is not UTF-8 */
        if (!text) test_fail(__FILE__, __LINE__, "half a character: %s", part);
        json_decref(text);
        strncat(whole, part, sizeof whole - strlen(whole) - 1);
        parts++;
    }
    CHECK_EQ_S(whole, LEARNT "\n");
    CHECK(parts > 4);
    close(in[1]);
    CHECK_EQ_I(wait_for(pid), 0);
    close(in[0]), close(to[0]), close(to[1]);
}

/* Waits up to a minute for a text in $D/NAME. */
static bool wait_text(const char *name, const char *text) {
    for (int i = 0; i < 60000; i++) {
        char *s = slurp(test_path(name), NULL);
        bool there = s && strstr(s, text);
        free(s);
        if (there) return true;
        usleep(1000);
    }
    return false;
}

/* Ctrl-C stops an answer, which would take minutes, and then ends the program. */
TEST(interrupted_answers) {
    NEED_PROGRAM();
    REQUIRE(setup());
    RUN("sed 's/:48,\"tie/:1000000,\"tie/' $D/config.json >$D/long.json", 0);
    RUN("$R sft --init $D/long.json --tokenizer $D/tok --data $D/text.jsonl --out $D/endless "
        "--max_steps 1", 0);
    static const char *const files[] = {"endless/config.json", "endless/generation_config.json"};
    for (int i = 0; i < 2; i++) {
        json_t *j = json_load_file(test_path(files[i]), 0, NULL);
        json_object_del(j, "eos_token_id");
        CHECK(json_dump_file(j, test_path(files[i]), 0) == 0);
        json_decref(j);
    }
    char model[600];
    snprintf(model, sizeof model, "%s/endless", test_dir());
    char *argv[] = {"rlhf",          "chat", "--model",          model,    "--temperature", "0",
                    "--threads", "1",    "--max_new_tokens", "100000", NULL};
    for (int quit = 0; quit < 2; quit++) {
        int in[2];
        REQUIRE(pipe(in) == 0);
        pid_t pid = start(argv, in[0], -1, -1);
        CHECK(write(in[1], "one\n", 4) == 4);
        bool begun = false;
        for (int i = 0; i < 60000 && !begun; i++) {
            usleep(1000);
            size_t n;
            free(slurp(test_path("stdout"), &n));
            begun = n > 0;
        }
        CHECK(begun);
        kill(pid, SIGINT);
        CHECK(wait_text("stderr", "(stopped)"));
        if (quit) CHECK(write(in[1], "/quit\n", 6) == 6);
        else kill(pid, SIGINT);
        int code = wait_for(pid);
        if (quit ? code != 0 : code != 130 && code != 1000 + SIGINT)
            test_fail(__FILE__, __LINE__, "quit %d: exit code %d", quit, code);
        close(in[0]), close(in[1]);
    }
}

TEST_MAIN(CASE(training_commands), CASE(other_commands), CASE(help_lists_every_option),
          CASE(usage_errors), CASE(options_in_every_form), CASE(config_file),
          CASE(containers_of_records), CASE(dry_runs), CASE(aspects_and_qualification),
          CASE(slices_of_rm_and_eval),
          CASE(label_two_checkpoints), CASE(label_rounds), CASE(label_most_uncertain_first),
          CASE(label_demonstrations), CASE(label_vetting), CASE(label_goes_on),
          CASE(long_records_are_counted),
          CASE(bad_records),
          CASE(bad_weights), CASE(bad_model_directories), CASE(bad_tokenizers),
          CASE(wrong_kinds_of_models), CASE(context_overflow), CASE(unwritable_places),
          CASE(interrupted_sft), CASE(interrupted_rm), CASE(interrupted_ppo),
          CASE(resume_of_another_run), CASE(interrupted_while_it_reads),
          CASE(adapters_are_merged), CASE(conversations), CASE(conversations_as_transcripts),
          CASE(answers_come_as_they_are_made), CASE(interrupted_answers))
