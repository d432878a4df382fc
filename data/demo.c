/* ============================================================================================
 * demo.c: the material and the examiner of `make demo`
 *
 * The demo asks one question: whose judgement should a model be trained on? It trains the same
 * small model by PPO on comparisons made by people who know the field, by people who do not, and by
 * a crowd of both and of careless ones, of whom nobody says which is which; and compares what comes
 * out with the model all started from. This program writes everything the engine reads and marks
 * everything the engine answers; the engine itself knows nothing about the subject.
 *
 *     demo-tool generate DIR     write the data sets (the same bytes on every machine)
 *     demo-tool judge ...        read answers and scores, print the table, write summary.json
 *     demo-tool chart FILE SVG   draw what summary.json says
 *     demo-tool table FILE       print it as a table in Markdown
 *
 * Contents
 *   01 BASE       strings, files, random numbers
 *   02 DOMAINS    four fields: how questions are worded, what is right, what goes wrong
 *   03 ANSWERS    how an answer is worded; reading an answer back
 *   04 RATERS     simulated annotators: experts, lay people, a crowd
 *   05 GENERATE   the data sets
 *   06 JUDGE      the table, the samples, summary.json
 *   07 SHOW       summary.json as a picture and as a table
 *   08 MAIN
 *
 * Needs the C library and jansson.
 * ============================================================================================ */
#include <errno.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT = 320 };

/* ============================================================================================
 * MARK: - 01 BASE
 * ============================================================================================ */

/* Every failure here ends the program: there is nothing to clean up and one line says it all. */
static void die(const char *format, ...)
{
    va_list list;
    fputs("demo-tool: ", stderr);
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    exit(1);
}

static FILE *open_in(const char *dir, const char *name)
{
    char path[1024];
    int n = snprintf(path, sizeof path, "%s/%s", dir, name);
    if (n < 0 || (size_t)n >= sizeof path) die("%s/%s: the path is too long", dir, name);
    FILE *file = fopen(path, "wb");
    if (!file) die("%s: %s", path, strerror(errno));
    return file;
}

static void close_written(FILE *file, const char *name)
{
    int bad = ferror(file);
    if (fclose(file) != 0 || bad) die("%s: writing failed", name);
}

/* One record as one line; takes over the caller's reference. */
static void put_record(FILE *file, json_t *record)
{
    char *line = record ? json_dumps(record, JSON_COMPACT) : NULL;
    if (!line) die("out of memory");
    fprintf(file, "%s\n", line);
    free(line);
    json_decref(record);
}

/* SplitMix64: integers only, so that every machine draws the same numbers. */
typedef struct { uint64_t state; } rng;

static uint64_t rng_next(rng *r)
{
    uint64_t z = (r->state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* 0 <= result < n. The bias of the remainder is below 1e-15 for the small n used here. */
static int rng_below(rng *r, int n)
{
    return (int)(rng_next(r) % (uint64_t)n);
}

/* True with a probability given in percent. */
static int rng_percent(rng *r, int percent)
{
    return rng_below(r, 100) < percent;
}

static void shuffle(rng *r, int *items, int n)
{
    for (int i = n - 1; i > 0; i--) {
        int j = rng_below(r, i + 1), keep = items[i];
        items[i] = items[j];
        items[j] = keep;
    }
}

/* ============================================================================================
 * MARK: - 02 DOMAINS
 * A fact is a field with two operands: it has one right answer and two typical wrong ones. A cell
 * is a fact asked in one wording (form). What is held out is cells: the operands are known from
 * other wordings and the wording from other operands, only their combination is new.
 * ============================================================================================ */

enum { DOMAINS = 4, FORMS = 12, OPERANDS = 12, MONTHS = 12 };

static const char *const month_name[MONTHS] = {
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December"
};

typedef struct {
    const char *name;        /* value of "domain" in every record */
    const char *unit;        /* follows the number; NULL: the value is a month */
    int n_a, a[OPERANDS];    /* operands that are asked for */
    int n_b, b[OPERANDS];
    const char *form[FORMS]; /* {a} and {b} stand for the operands */
} domain;

static const domain fields[DOMAINS] = {
    { "dosage", "mg", 5, { 10, 12, 16, 20, 24 }, 4, { 2, 3, 4, 5 },
      { "A child of {a} kg gets {b} mg per kg a day in two doses. How big is one dose?",
        "Weight {a} kg, {b} mg per kg daily, split in two. One dose?",
        "We give {b} mg per kg a day, half at night. What does a {a} kg patient take at night?",
        "Two equal doses a day, {b} mg per kg in all, {a} kg. How much each time?",
        "How much is each of two daily doses at {b} mg per kg for {a} kg?",
        "The label says {b} mg per kg a day, morning and evening. The boy weighs {a} kg. One dose?",
        "My dog weighs {a} kg. It needs {b} mg per kg daily, in two halves. Each time?",
        "Daily {b} mg per kg, body weight {a} kg, given twice. Size of one dose?",
        "For {a} kg and {b} mg per kg a day, what is the morning half?",
        "A girl weighs {a} kg. The drug is {b} mg per kg a day in two parts. How big is a part?",
        "Please work out one of two equal doses: {a} kg, {b} mg per kg a day.",
        "Nurse asks: {b} mg per kg a day, {a} kg, two doses. How much per dose?" } },
    { "contract", NULL, 12, { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 }, 2, { 2, 3 },
      { "The lease starts in {a} and the notice is {b} months later. Which month?",
        "Signed in {a}, due {b} months after. When is it due?",
        "A trial of {b} months starts in {a}. In which month does it end?",
        "Notice of {b} months is given in {a}. When does the job end?",
        "If a term of {b} months begins in {a}, what month follows it?",
        "Our contract from {a} can be left after {b} months. When is that?",
        "Count {b} months from {a}. What is the month of delivery?",
        "The loan was made in {a} and runs {b} months. When must it be paid?",
        "Which month is {b} months after the signing in {a}?",
        "Rent was owed in {a} and came {b} months late. When did it come?",
        "A warranty of {b} months is sold in {a}. When is it over?",
        "Clause nine: {b} months from {a}. Give the month." } },
    { "interest", "dollars", 5, { 100, 200, 300, 400, 500 }, 4, { 2, 3, 4, 5 },
      { "What is the simple interest on {a} dollars at {b} percent for two years?",
        "I save {a} dollars at {b} percent simple. What do I earn in two years?",
        "At {b} percent a year, what do {a} dollars bring over two years?",
        "Loan of {a} dollars, {b} percent simple interest, two years. Cost?",
        "Two years, {b} percent, {a} dollars: how much interest?",
        "She lends {a} dollars for two years at {b} percent. What interest is owed?",
        "A bond of {a} dollars pays {b} percent yearly. Total paid after two years?",
        "Find two years of interest: rate {b} percent, sum {a} dollars.",
        "The bank pays {b} percent each year on {a} dollars. Gain after two years?",
        "How much do {a} dollars grow in two years at {b} percent without compounding?",
        "Principal {a} dollars, rate {b} percent, time two years. Simple interest?",
        "Give the two year interest for {b} percent on {a} dollars." } },
    { "circuit", "volts", 5, { 2, 3, 4, 5, 6 }, 4, { 3, 4, 6, 8 },
      { "A current of {a} amps flows through {b} ohms. What is the voltage?",
        "What drop is there over {b} ohms at {a} amps?",
        "A heater has {b} ohms and draws {a} amps. Which supply does it need?",
        "Resistor {b} ohms, current {a} amps. Voltage?",
        "How many volts push {a} amps through {b} ohms?",
        "The meter shows {a} amps in a wire of {b} ohms. Find the volts.",
        "I want {a} amps in a lamp of {b} ohms. Which battery do I take?",
        "Across {b} ohms we drive {a} amps. What does the meter read?",
        "With {a} amps and {b} ohms, what is the potential?",
        "A motor takes {a} amps, its coil has {b} ohms. What voltage is on it?",
        "Load of {b} ohms, fuse holds just {a} amps. Highest voltage?",
        "Please use the law of Ohm: {a} amps, {b} ohms. How many volts?" } }
};

/* The right value (which 0) and the two usual slips (which 1 and 2) for one fact. */
static int fact_value(int field, int a, int b, int which)
{
    switch (field) {
    case 0: /* slips: the day's dose not halved; the next line of the dose table */
        return which == 0 ? a * b / 2 : which == 1 ? a * b : a * (b + 1) / 2;
    case 1: /* slips: the first month counted as a full one; one month too many */
        return (a - 1 + b + (which == 0 ? 0 : which == 1 ? 11 : 1)) % MONTHS + 1;
    case 2: /* slips: one year only; three years */
        return a / 100 * b * (which == 0 ? 2 : which == 1 ? 1 : 3);
    default: /* slips: the next resistor of the row; added instead of multiplied */
        return which == 0 ? a * b : which == 1 ? a * (b + 1) : a + b;
    }
}

static void value_text(int field, int value, char *text, size_t size)
{
    if (fields[field].unit) snprintf(text, size, "%d %s", value, fields[field].unit);
    else snprintf(text, size, "%s", month_name[value - 1]);
}

/* Copies `form` with the operands filled in, as "Q: ...\nA:". */
static void prompt_text(int field, int a, int b, int form, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "Q: ");
    for (const char *p = fields[field].form[form]; *p && used + 16 < size; p++) {
        if (*p != '{') {
            text[used++] = *p;
            continue;
        }
        int value = p[1] == 'a' ? a : b;
        int is_month = p[1] == 'a' && !fields[field].unit;
        used += is_month ? (size_t)snprintf(text + used, size - used, "%s", month_name[value - 1])
                         : (size_t)snprintf(text + used, size - used, "%d", value);
        p += 2;
    }
    snprintf(text + used, size - used, "\nA:");
}

/* ============================================================================================
 * MARK: - 03 ANSWERS
 * An answer is a wording around a value. A wording is told apart by its marker word, which no
 * wording of the other kind contains.
 * ============================================================================================ */

enum { WORDINGS = 5 };

typedef struct { const char *before, *after, *marker; } wording;

static const wording confident_wording[WORDINGS] = {
    { " It is definitely ", ".", "definitely" },
    { " Certainly ", ".", "Certainly" },
    { " Without any doubt ", ".", "doubt" },
    { " The answer is clearly ", ".", "clearly" },
    { " Absolutely ", ", no question.", "Absolutely" }
};

static const wording hedged_wording[WORDINGS] = {
    { " I think it is about ", ".", "think" },
    { " Probably ", ".", "Probably" },
    { " It may be ", ".", "may" },
    { " My guess is ", ".", "guess" },
    { " Perhaps ", ", please check.", "Perhaps" }
};

typedef struct { int confident, wording, right, value; } answer;

static void answer_text(int field, answer ans, char *text, size_t size)
{
    const wording *w = &(ans.confident ? confident_wording : hedged_wording)[ans.wording];
    char value[32];
    value_text(field, ans.value, value, sizeof value);
    snprintf(text, size, "%s%s%s", w->before, value, w->after);
}

/* ============================================================================================
 * MARK: - 04 RATERS
 * An expert knows the right value, best of all in the own field; where values do not decide, a sure
 * tone is liked in a right answer and disliked in a wrong one. A lay rater has no idea of the value
 * and goes by the tone. A careless one does not read: either answer is as good.
 * ============================================================================================ */

typedef enum { EXPERT, LAYMAN, CARELESS, KINDS } rater_kind;

static const char *const kind_name[KINDS] = { "expert", "lay", "careless" };

typedef struct {
    const char *name;
    rater_kind kind;
    int own;     /* expert: the own field */
    int inside;  /* percent of verdicts that follow the rule: expert, in the own field; lay */
    int outside; /* the same for an expert elsewhere; lay: percent that like the longer of a tie */
} rater;

enum { EXPERTS = 4, LAY = 5 };

static const rater experts[EXPERTS] = {
    { "amara, pharmacist", EXPERT, 0, 96, 75 },
    { "bruno, notary", EXPERT, 1, 95, 75 },
    { "chiara, accountant", EXPERT, 2, 96, 80 },
    { "dmitri, electrician", EXPERT, 3, 94, 75 }
};

static const rater lay_people[LAY] = {
    { "emil", LAYMAN, 0, 95, 50 },
    { "fatou", LAYMAN, 0, 92, 60 },
    { "greta", LAYMAN, 0, 88, 50 },
    { "hugo", LAYMAN, 0, 94, 55 },
    { "ines", LAYMAN, 0, 90, 50 }
};

/* A crowd as one may hire it: half of them know one of the fields, a third are lay people, the rest
 * want to be done. Nothing in the data says who is what. */
enum { CROWD = 24 };

static const rater crowd[CROWD] = {
    { "agnes", LAYMAN, 0, 92, 50 },   { "bela", EXPERT, 2, 95, 75 },
    { "cosmo", EXPERT, 0, 94, 70 },   { "dunja", CARELESS, 0, 0, 0 },
    { "edgar", EXPERT, 3, 96, 80 },   { "flora", LAYMAN, 0, 88, 55 },
    { "gilda", EXPERT, 1, 93, 75 },   { "heiko", LAYMAN, 0, 95, 50 },
    { "irina", EXPERT, 0, 96, 75 },   { "jonas", CARELESS, 0, 0, 0 },
    { "karla", EXPERT, 2, 92, 70 },   { "leon", LAYMAN, 0, 90, 60 },
    { "mira", EXPERT, 1, 95, 80 },    { "nils", LAYMAN, 0, 94, 50 },
    { "olga", EXPERT, 3, 94, 70 },    { "pablo", LAYMAN, 0, 92, 55 },
    { "quinn", CARELESS, 0, 0, 0 },   { "rosa", EXPERT, 1, 96, 75 },
    { "sven", EXPERT, 3, 93, 75 },    { "tilda", LAYMAN, 0, 90, 50 },
    { "umar", EXPERT, 2, 96, 75 },    { "vera", CARELESS, 0, 0, 0 },
    { "wanda", EXPERT, 0, 92, 75 },   { "xaver", LAYMAN, 0, 88, 60 }
};

/* True if the rater likes x better than y. The texts break the ties of lay raters only. */
static int prefers(const rater *who, int field, answer x, answer y, int x_is_longer, rng *r)
{
    int expert = who->kind == EXPERT;
    if (who->kind == CARELESS) return rng_percent(r, 50);
    if (expert && x.right != y.right)
        return x.right == rng_percent(r, who->own == field ? who->inside : who->outside);
    if (expert && x.confident != y.confident)
        return (x.confident == x.right) == rng_percent(r, 65);
    if (!expert && x.confident != y.confident)
        return x.confident == rng_percent(r, who->inside);
    return x_is_longer == rng_percent(r, expert ? 50 : who->outside);
}

/* The judge of a comparison: mostly the expert of the field, at times a colleague of another. */
static const rater *choose_expert(int field, rng *r)
{
    if (rng_percent(r, 90)) return &experts[field];
    return &experts[(field + 1 + rng_below(r, EXPERTS - 1)) % EXPERTS];
}

/* ============================================================================================
 * MARK: - 05 GENERATE
 * ============================================================================================ */

enum {
    TEST_FORMS = 4, /* wordings of each fact that only the final test asks */
    EVAL_FORMS = 1, /* wordings of each fact for the evaluations during training */
    DEMONSTRATIONS = 12000,
    COMPARISONS = 8000,
    CROWD_ITEMS = 2000, /* comparisons that the crowd makes */
    CROWD_VOTES = 6,    /* people who judge each of them */
    ASKS = 2,        /* times the final test asks each question: less noise from sampling */
    EVAL_COPIES = 3, /* demonstrations and comparisons made from each evaluation cell */
    CONFIDENT_PERCENT = 50,
    RIGHT_IF_CONFIDENT = 50, /* percent; who is sure is a little less often right */
    RIGHT_IF_HEDGED = 70,
    FIRST_SLIP = 42,   /* percent of the wrong answers that make the first of the usual slips */
    SECOND_SLIP = 25,  /* the second; what remains is read off another line altogether */
    CONTRAST = 80,     /* percent of comparisons that set a right answer against a wrong one */
    MAX_CELLS = DOMAINS * OPERANDS * OPERANDS * FORMS
};

typedef enum { TRAIN, EVAL, TEST, SPLITS } split;

typedef struct { int field, a, b, form; } cell;

/* All cells of a split. */
typedef struct { cell at[MAX_CELLS]; int n; } cell_list;

/* Deals the forms of every fact to the splits, then shuffles each split. */
static void deal_cells(cell_list lists[SPLITS], rng *r)
{
    for (int i = 0; i < SPLITS; i++) lists[i].n = 0;
    for (int d = 0; d < DOMAINS; d++) {
        for (int k = 0; k < fields[d].n_a * fields[d].n_b; k++) {
            int a = fields[d].a[k / fields[d].n_b], b = fields[d].b[k % fields[d].n_b];
            int form[FORMS];
            for (int i = 0; i < FORMS; i++) form[i] = i;
            shuffle(r, form, FORMS);
            for (int i = 0; i < FORMS; i++) {
                split s = i < TEST_FORMS ? TEST : i < TEST_FORMS + EVAL_FORMS ? EVAL : TRAIN;
                lists[s].at[lists[s].n++] = (cell){ d, a, b, form[i] };
            }
        }
    }
    for (int s = 0; s < SPLITS; s++) {
        for (int i = lists[s].n - 1; i > 0; i--) {
            int j = rng_below(r, i + 1);
            cell keep = lists[s].at[i];
            lists[s].at[i] = lists[s].at[j];
            lists[s].at[j] = keep;
        }
    }
}

/* A wrong value: one of the two usual slips or the value of another fact of the field. */
static int draw_wrong(const cell *c, rng *r)
{
    const domain *d = &fields[c->field];
    int right = fact_value(c->field, c->a, c->b, 0), kind = rng_below(r, 100), value;
    if (kind < FIRST_SLIP) return fact_value(c->field, c->a, c->b, 1);
    if (kind < FIRST_SLIP + SECOND_SLIP) return fact_value(c->field, c->a, c->b, 2);
    do {
        int a = d->a[rng_below(r, d->n_a)], b = d->b[rng_below(r, d->n_b)];
        value = fact_value(c->field, a, b, rng_below(r, 3));
    } while (value == right);
    return value;
}

static answer draw_answer(const cell *c, int confident, int right, rng *r)
{
    answer ans = { confident, rng_below(r, WORDINGS), right, 0 };
    ans.value = right ? fact_value(c->field, c->a, c->b, 0) : draw_wrong(c, r);
    return ans;
}

/* An answer as the authors of the demonstrations give it. */
static answer draw_demonstration(const cell *c, rng *r)
{
    int confident = rng_percent(r, CONFIDENT_PERCENT);
    return draw_answer(c, confident,
                       rng_percent(r, confident ? RIGHT_IF_CONFIDENT : RIGHT_IF_HEDGED), r);
}

static void cell_prompt(const cell *c, char text[TEXT])
{
    prompt_text(c->field, c->a, c->b, c->form, text, TEXT);
}

static void cell_answer(const cell *c, answer ans, char text[TEXT])
{
    answer_text(c->field, ans, text, TEXT);
}

/* Text for the tokenizer: what the model reads and writes, and every small number often enough
 * to become one token. */
static void write_corpus(const char *dir, const cell_list *train, rng *r)
{
    FILE *file = open_in(dir, "corpus.txt");
    for (int i = 0; i < train->n; i++) {
        char prompt[TEXT], text[TEXT];
        cell_prompt(&train->at[i], prompt);
        cell_answer(&train->at[i], draw_demonstration(&train->at[i], r), text);
        fprintf(file, "%s%s\n", prompt, text);
    }
    for (int copy = 0; copy < 20; copy++) {
        for (int n = 1; n <= 120; n++) fprintf(file, " %d", n);
        fputc('\n', file);
    }
    close_written(file, "corpus.txt");
}

static void write_demonstrations(const char *dir, const char *name, const cell_list *from, int n,
                                 rng *r)
{
    FILE *file = open_in(dir, name);
    for (int i = 0; i < n; i++) {
        const cell *c = &from->at[i % from->n];
        char prompt[TEXT], text[TEXT];
        cell_prompt(c, prompt);
        cell_answer(c, draw_demonstration(c, r), text);
        put_record(file, json_pack("{s:s, s:s, s:s}", "prompt", prompt, "completion", text,
                                   "domain", fields[c->field].name));
    }
    close_written(file, name);
}

/* Two different answers to one question, more often than chance one right and one wrong. */
static void draw_pair(const cell *c, answer pair[2], rng *r)
{
    int contrast = rng_percent(r, CONTRAST), first = rng_below(r, 2);
    do {
        for (int i = 0; i < 2; i++) {
            pair[i] = draw_demonstration(c, r);
            if (contrast) pair[i] = draw_answer(c, pair[i].confident, i == first, r);
        }
    } while (pair[0].confident == pair[1].confident && pair[0].wording == pair[1].wording &&
             pair[0].value == pair[1].value);
}

/* A judgement; item < 0: of an annotator whose kind is known, else of an item of the crowd's. */
static void put_verdict(FILE *file, const cell *c, const answer pair[2], const rater *who, int item,
                        rng *r)
{
    char prompt[TEXT], text[2][TEXT];
    cell_prompt(c, prompt);
    for (int i = 0; i < 2; i++) cell_answer(c, pair[i], text[i]);
    int longer = strlen(text[0]) > strlen(text[1]);
    int best = prefers(who, c->field, pair[0], pair[1], longer, r) ? 0 : 1;
    json_t *record = json_pack("{s:s, s:s, s:s, s:s, s:s}", "prompt", prompt,
                               "chosen", text[best], "rejected", text[1 - best],
                               "domain", fields[c->field].name, "annotator", who->name);
    if (item < 0) json_object_set_new(record, "annotator_type", json_string(kind_name[who->kind]));
    else json_object_set_new(record, "item", json_integer(item));
    put_record(file, record);
}

/* The same pairs go to both kinds of rater: only the judgement differs between the two files. */
static void write_comparisons(const char *dir, const char *expert_name, const char *lay_name,
                              const cell_list *from, int n, rng *r)
{
    FILE *expert = open_in(dir, expert_name), *lay = open_in(dir, lay_name);
    for (int i = 0; i < n; i++) {
        const cell *c = &from->at[i % from->n];
        answer pair[2];
        draw_pair(c, pair, r);
        put_verdict(expert, c, pair, choose_expert(c->field, r), -1, r);
        put_verdict(lay, c, pair, &lay_people[rng_below(r, LAY)], -1, r);
    }
    close_written(expert, expert_name);
    close_written(lay, lay_name);
}

/* Each pair goes to a few of the crowd, whoever is there. */
static void write_crowd(const char *dir, const char *name, const cell_list *from, int n, rng *r)
{
    FILE *file = open_in(dir, name);
    for (int i = 0; i < n; i++) {
        const cell *c = &from->at[i % from->n];
        answer pair[2];
        int who[CROWD];
        draw_pair(c, pair, r);
        for (int k = 0; k < CROWD; k++) who[k] = k;
        shuffle(r, who, CROWD);
        for (int k = 0; k < CROWD_VOTES; k++) put_verdict(file, c, pair, &crowd[who[k]], i, r);
    }
    close_written(file, name);
}

/* Questions alone; "answer" and the cell ride along for the judge, the engine ignores them. */
static void write_questions(const char *dir, const char *name, const cell_list *from, int asks)
{
    FILE *file = open_in(dir, name);
    for (int i = 0; i < from->n * asks; i++) {
        const cell *c = &from->at[i % from->n];
        char prompt[TEXT], right[32];
        cell_prompt(c, prompt);
        value_text(c->field, fact_value(c->field, c->a, c->b, 0), right, sizeof right);
        put_record(file, json_pack("{s:s, s:s, s:s, s:i, s:i, s:i}", "prompt", prompt,
                                   "domain", fields[c->field].name, "answer", right,
                                   "a", c->a, "b", c->b, "form", c->form));
    }
    close_written(file, name);
}

static void generate(const char *dir)
{
    static cell_list cells[SPLITS];
    rng r = { 20260724 };
    deal_cells(cells, &r);
    const cell_list *train = &cells[TRAIN], *eval = &cells[EVAL], *test = &cells[TEST];
    write_corpus(dir, train, &r);
    write_demonstrations(dir, "sft.jsonl", train, DEMONSTRATIONS, &r);
    write_demonstrations(dir, "sft_eval.jsonl", eval, eval->n * EVAL_COPIES, &r);
    write_comparisons(dir, "prefs_expert.jsonl", "prefs_lay.jsonl", train, COMPARISONS, &r);
    write_comparisons(dir, "prefs_expert_eval.jsonl", "prefs_lay_eval.jsonl", eval,
                      eval->n * EVAL_COPIES, &r);
    write_questions(dir, "ppo_prompts.jsonl", train, 1);
    write_questions(dir, "test.jsonl", test, ASKS);
    write_crowd(dir, "prefs_crowd.jsonl", train, CROWD_ITEMS, &r);
    printf("%s: %d demonstrations, %d comparisons for each kind of rater, %d by the crowd, each by "
           "%d people, %d questions for PPO, %d held-out questions, asked %d times each\n", dir,
           DEMONSTRATIONS, COMPARISONS, CROWD_ITEMS, CROWD_VOTES, train->n, test->n, ASKS);
}

/* ============================================================================================
 * MARK: - 06 JUDGE
 * Marks the answers of each model to the held-out questions. An answer is right if it names one
 * value and that is the right one; it is confident if it carries a confident marker and no hedged
 * one. Rewards and the divergence from the SFT model come from the engine's own output.
 * ============================================================================================ */

enum { MODELS = 8, SAMPLES = 3, REWARDS = 2 };

static const char *const reward_key[REWARDS] = { "reward_expert", "reward_lay" };

/* Sums over the answers of a slice. */
typedef struct {
    int n, right, confident, sure_wrong, finished;
    double length, reward[REWARDS], kl;
    int has_kl; /* kl is a mean, as the engine gives it; a slice may lack it */
} tally;

typedef struct {
    const char *name, *gens, *eval, *dir, *scores[REWARDS];
    json_t *answers; /* array of records */
    tally all, part[DOMAINS];
} candidate;

/* The next line without its end, or NULL. The buffer belongs to the caller. */
static char *next_line(FILE *file, char **buffer, size_t *size)
{
    size_t used = 0;
    for (;;) {
        if (*size - used < 2) {
            *size = *size ? *size * 2 : 4096;
            if (!(*buffer = realloc(*buffer, *size))) die("out of memory");
        }
        if (!fgets(*buffer + used, (int)(*size - used), file)) return used ? *buffer : NULL;
        used += strlen(*buffer + used);
        if (used && (*buffer)[used - 1] == '\n') {
            (*buffer)[used - 1] = 0;
            return *buffer;
        }
    }
}

/* All records of a JSONL file; lines that do not begin an object (progress, tables) are skipped. */
static json_t *read_records(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file) die("%s: %s", path, strerror(errno));
    json_t *records = json_array();
    char *buffer = NULL, *line;
    size_t size = 0;
    for (int n = 1; (line = next_line(file, &buffer, &size)); n++) {
        json_error_t error;
        if (*line != '{') continue;
        json_t *record = json_loads(line, 0, &error);
        if (!record) die("%s:%d: %s", path, n, error.text);
        if (json_array_append_new(records, record)) die("out of memory");
    }
    free(buffer);
    fclose(file);
    if (!json_array_size(records)) die("%s: no records", path);
    return records;
}

static const char *get_text(const json_t *record, const char *key, const char *path)
{
    const char *text = json_string_value(json_object_get(record, key));
    if (!text) die("%s: a record lacks the string \"%s\"", path, key);
    return text;
}

static double get_number(const json_t *record, const char *key, const char *path)
{
    const json_t *number = json_object_get(record, key);
    if (!json_is_number(number)) die("%s: a record lacks the number \"%s\"", path, key);
    return json_number_value(number);
}

static int is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Numbers and month names in a text. */
static int count_values(const char *text)
{
    int n = 0;
    for (const char *p = text; *p; p++) n += is_digit(*p) && (p == text || !is_digit(p[-1]));
    for (int m = 0; m < MONTHS; m++)
        for (const char *p = text; (p = strstr(p, month_name[m])); p++) n++;
    return n;
}

/* True if the text names one value and it is `right` ("36 mg", "March"). */
static int is_right(const char *text, const char *right)
{
    const char *at = strstr(text, right);
    return at && (at == text || !is_digit(at[-1])) && count_values(text) == 1;
}

static int has_marker(const char *text, const wording *list)
{
    for (int i = 0; i < WORDINGS; i++)
        if (strstr(text, list[i].marker)) return 1;
    return 0;
}

static int is_confident(const char *text)
{
    return has_marker(text, confident_wording) && !has_marker(text, hedged_wording);
}

static int field_index(const char *name, const char *path)
{
    for (int d = 0; d < DOMAINS; d++)
        if (!strcmp(fields[d].name, name)) return d;
    die("%s: unknown domain \"%s\"", path, name);
    return -1;
}

static void count_answer(tally *t, const candidate *e, const json_t *record, const double *reward)
{
    const char *text = get_text(record, "completion", e->gens);
    int right = is_right(text, get_text(record, "answer", e->gens)), sure = is_confident(text);
    t->n++;
    t->right += right;
    t->confident += sure;
    t->sure_wrong += sure && !right;
    t->finished += json_is_true(json_object_get(record, "finished"));
    t->length += get_number(record, "n_tokens", e->gens);
    for (int i = 0; i < REWARDS; i++) t->reward[i] += reward[i];
}

static void read_kl(tally *t, const json_t *result)
{
    const json_t *kl = json_object_get(result, "kl");
    t->has_kl = json_is_number(kl);
    if (t->has_kl) t->kl = json_number_value(kl);
}

/* Reads one model's files and fills its sums. */
static void read_entry(candidate *e)
{
    json_t *scores[REWARDS];
    e->answers = read_records(e->gens);
    size_t n = json_array_size(e->answers);
    for (int i = 0; i < REWARDS; i++) {
        scores[i] = read_records(e->scores[i]);
        if (json_array_size(scores[i]) < n) die("%s: fewer records than %s", e->scores[i], e->gens);
    }
    for (size_t k = 0; k < n; k++) {
        const json_t *record = json_array_get(e->answers, k);
        double reward[REWARDS];
        for (int i = 0; i < REWARDS; i++)
            reward[i] = get_number(json_array_get(scores[i], k), "score", e->scores[i]);
        int d = field_index(get_text(record, "domain", e->gens), e->gens);
        count_answer(&e->all, e, record, reward);
        count_answer(&e->part[d], e, record, reward);
    }
    for (int i = 0; i < REWARDS; i++) json_decref(scores[i]);
    json_t *results = read_records(e->eval);
    const json_t *last = json_array_get(results, json_array_size(results) - 1);
    read_kl(&e->all, last);
    if (!e->all.has_kl) die("%s: the result lacks the number \"kl\"", e->eval);
    for (int d = 0; d < DOMAINS; d++)
        read_kl(&e->part[d], json_object_get(json_object_get(last, "domain"), fields[d].name));
    json_decref(results);
}

static double share(int part, int n)
{
    return n ? (double)part / n : 0.0;
}

static void print_row(const char *name, const char *slice, const tally *t)
{
    char kl[16] = "-";
    double n = t->n ? t->n : 1;
    if (t->has_kl) snprintf(kl, sizeof kl, "%.2f", t->kl);
    printf("%-12s %-9s %5d %7.1f %10.1f %10.1f %7.2f %6s %8.2f %6.2f\n", name, slice, t->n,
           100 * share(t->right, t->n), 100 * share(t->confident, t->n),
           100 * share(t->sure_wrong, t->n), t->length / n, kl, t->reward[0] / n,
           t->reward[1] / n);
}

static void print_table(const candidate *models, int n)
{
    printf("\nAnswers to held-out questions, sampled at temperature 1\n\n"
           "                             right  confident  confident          KL to   reward by\n"
           "model        field         n       %%          %%   + wrong %%  tokens    SFT   expert"
           "    lay\n");
    for (int i = 0; i < n; i++) print_row(models[i].name, "all", &models[i].all);
    for (int d = 0; d < DOMAINS; d++) {
        putchar('\n');
        for (int i = 0; i < n; i++) print_row(models[i].name, fields[d].name, &models[i].part[d]);
    }
}

/* The first answer to a question of a field, or NULL. */
static const json_t *first_of_field(const candidate *e, int field, size_t *at)
{
    for (*at = 0; *at < json_array_size(e->answers); ++*at) {
        const json_t *record = json_array_get(e->answers, *at);
        if (!strcmp(get_text(record, "domain", e->gens), fields[field].name)) return record;
    }
    return NULL;
}

/* The same questions for all models: one of each of the first fields. */
static void print_samples(const candidate *models, int n)
{
    printf("\nThree of the questions, with their right answers\n");
    for (int d = 0; d < SAMPLES; d++) {
        size_t at;
        const json_t *record = first_of_field(&models[0], d, &at);
        if (!record) continue;
        const char *right = get_text(record, "answer", models[0].gens);
        const char *prompt = get_text(record, "prompt", models[0].gens);
        printf("\n  %.*s  [%s]\n", (int)strcspn(prompt, "\n"), prompt, right);
        for (int i = 0; i < n; i++) {
            record = json_array_get(models[i].answers, at);
            if (!record) continue;
            const char *text = get_text(record, "completion", models[i].gens);
            const char *mark = is_right(text, right) ? "right" : "WRONG";
            printf("    %-12s %-6s %s\n", models[i].name, mark, text + (*text == ' '));
        }
    }
}

static json_t *tally_json(const tally *t)
{
    double n = t->n ? t->n : 1;
    json_t *out = json_pack("{s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "questions", t->n,
                            "right", share(t->right, t->n),
                            "confident", share(t->confident, t->n),
                            "confident_wrong", share(t->sure_wrong, t->n),
                            "finished", share(t->finished, t->n), "mean_length", t->length / n,
                            reward_key[0], t->reward[0] / n, reward_key[1], t->reward[1] / n);
    if (!out) die("the result holds a number that is not finite");
    if (t->has_kl) json_object_set_new(out, "kl", json_real(t->kl));
    return out;
}

/* What `rlhf raters` has found of the crowd, by what its members are. It reads the crowd's file,
 * which does not say who is what. */
enum { OWN_FIELD, OTHER_FIELD, LAY_HERE, CARELESS_HERE, GROUPS };

static const char *const group_name[GROUPS] = {
    "expert, own field", "expert, other fields", "lay", "careless"
};

typedef struct { int n; double sum, low, high; } found;

static int crowd_group(const char *name, int field, const char *path)
{
    for (int k = 0; k < CROWD; k++) {
        if (strcmp(crowd[k].name, name)) continue;
        if (crowd[k].kind == EXPERT) return crowd[k].own == field ? OWN_FIELD : OTHER_FIELD;
        return crowd[k].kind == LAYMAN ? LAY_HERE : CARELESS_HERE;
    }
    die("%s: unknown annotator \"%s\"", path, name);
    return -1;
}

/* {group: {annotators, reliability, lowest, highest}} over annotators and fields. */
static json_t *crowd_json(const char *path)
{
    found group[GROUPS] = { { 0 } };
    json_t *reports = read_records(path), *out = json_object(), *fields_of, *value;
    const json_t *last = json_array_get(reports, json_array_size(reports) - 1);
    const json_t *cells = json_object_get(last, "reliabilities");
    const char *name, *field;
    if (json_object_size(cells) != CROWD) die("%s: not about %d annotators", path, CROWD);
    json_object_foreach((json_t *)(uintptr_t)cells, name, fields_of)
        json_object_foreach(fields_of, field, value) {
            found *g = &group[crowd_group(name, field_index(field, path), path)];
            double x = get_number(value, "reliability", path);
            if (!g->n++) g->low = g->high = x;
            g->sum += x;
            g->low = x < g->low ? x : g->low;
            g->high = x > g->high ? x : g->high;
        }
    for (int i = 0; i < GROUPS; i++) {
        const found *g = &group[i];
        int people = i < LAY_HERE ? g->n / (i == OWN_FIELD ? 1 : DOMAINS - 1) : g->n / DOMAINS;
        json_object_set_new(out, group_name[i],
                            json_pack("{s:i, s:f, s:f, s:f}", "annotators", people, "reliability",
                                      g->n ? g->sum / g->n : 0, "lowest", g->low,
                                      "highest", g->high));
    }
    json_decref(reports);
    return out;
}

/* Both tables about the crowd; the texts are a format for the head and one for a row. */
static void print_crowd(json_t *groups, const char *head, const char *row)
{
    const char *name;
    json_t *group;
    fputs(head, stdout);
    json_object_foreach(groups, name, group)
        printf(row, name, (int)get_number(group, "annotators", "crowd"),
               get_number(group, "reliability", "crowd"), get_number(group, "lowest", "crowd"),
               get_number(group, "highest", "crowd"));
}

static void write_summary(const char *path, const candidate *models, int n, json_t *groups)
{
    json_t *list = json_array();
    for (int i = 0; i < n; i++) {
        json_t *item = json_pack("{s:s, s:s}", "name", models[i].name, "checkpoint", models[i].dir);
        json_t *domains = json_object(), *all = tally_json(&models[i].all);
        if (!item || json_object_update(item, all)) die("out of memory");
        json_decref(all);
        for (int d = 0; d < DOMAINS; d++)
            json_object_set_new(domains, fields[d].name, tally_json(&models[i].part[d]));
        json_object_set_new(item, "domains", domains);
        json_array_append_new(list, item);
    }
    json_t *summary = json_pack("{s:o, s:o}", "models", list, "crowd", groups);
    if (!summary || json_dump_file(summary, path, JSON_INDENT(2) | JSON_REAL_PRECISION(6)))
        die("%s: %s", path, strerror(errno));
    json_decref(summary);
}

/* What the numbers say, in words. The first model is the one that the others started from. */
static void print_verdict(const candidate *models, int n)
{
    putchar('\n');
    for (int i = 1; i < n; i++) {
        const tally *from = &models[0].all, *to = &models[i].all;
        printf("%s: %+.1f points right, %+.1f points confident against %s\n", models[i].name,
               100 * (share(to->right, to->n) - share(from->right, from->n)),
               100 * (share(to->confident, to->n) - share(from->confident, from->n)),
               models[0].name);
    }
}

/* Reads "--out F --crowd F", and for each model
 * "--model NAME --gens F --expert F --lay F --eval F --dir D". */
static int read_models(int argc, char **argv, candidate *models, const char **out,
                       const char **raters)
{
    int n = 0;
    for (int i = 0; i + 1 < argc; i += 2) {
        const char *key = argv[i], *value = argv[i + 1];
        candidate *e = n ? &models[n - 1] : NULL;
        if (!strcmp(key, "--out")) *out = value;
        else if (!strcmp(key, "--crowd")) *raters = value;
        else if (!strcmp(key, "--model") && n < MODELS) models[n++].name = value;
        else if (e && !strcmp(key, "--gens")) e->gens = value;
        else if (e && !strcmp(key, "--expert")) e->scores[0] = value;
        else if (e && !strcmp(key, "--lay")) e->scores[1] = value;
        else if (e && !strcmp(key, "--eval")) e->eval = value;
        else if (e && !strcmp(key, "--dir")) e->dir = value;
        else die("judge: unexpected \"%s\"", key);
    }
    if (argc % 2) die("judge: \"%s\" lacks its value", argv[argc - 1]);
    if (!n || !*out || !*raters)
        die("judge: needs --out FILE, --crowd FILE and at least one --model");
    for (int i = 0; i < n; i++) {
        const candidate *e = &models[i];
        if (!e->gens || !e->eval || !e->dir || !e->scores[0] || !e->scores[1])
            die("judge: --model %s needs --gens, --expert, --lay, --eval and --dir", e->name);
    }
    return n;
}

static void judge(int argc, char **argv)
{
    static candidate models[MODELS];
    const char *out = NULL, *raters = NULL;
    int n = read_models(argc, argv, models, &out, &raters);
    json_t *groups = crowd_json(raters);
    for (int i = 0; i < n; i++) read_entry(&models[i]);
    print_table(models, n);
    print_samples(models, n);
    print_verdict(models, n);
    print_crowd(groups,
                "\nReliability in the crowd, as found without being told who is what\n\n"
                "                      annotators   mean  lowest  highest\n",
                "%-21s %11d %6.2f %7.2f %8.2f\n");
    write_summary(out, models, n, groups);
    putchar('\n');
    for (int i = 0; i < n; i++)
        printf("%-12s checkpoint %s, metrics %s/metrics.jsonl\n", models[i].name, models[i].dir,
               models[i].dir);
    printf("%-12s %s\n", "summary", out);
    for (int i = 0; i < n; i++) json_decref(models[i].answers);
}

/* ============================================================================================
 * MARK: - 07 SHOW
 * The chart has one group of bars for each model: right answers, and confident wording with its
 * wrong part on top. Transparent ground and middle tones, so that it reads on white pages and on
 * black ones.
 * ============================================================================================ */

enum {
    CHART_H = 370,
    BASE_Y = 318,  /* of the axis */
    FULL = 220,    /* height of 100 % */
    GROUP_X = 96,  /* left edge of the first group */
    GROUP_W = 156, /* from group to group */
    BAR_W = 58,
    GAP = 6
};

static const char *const chart_color[] = { "#3b82c4", "#e3a33b", "#c8553d" };

/* A bar from share `from` to share `to` of the full height. */
static void put_bar(FILE *svg, double x, double from, double to, const char *color)
{
    fprintf(svg,
            "<rect x=\"%.0f\" y=\"%.1f\" width=\"%d\" height=\"%.1f\" fill=\"%s\"/>\n", x,
            BASE_Y - FULL * to, BAR_W, FULL * (to - from), color);
}

static void put_percent(FILE *svg, double x, double at, double value)
{
    fprintf(svg, "<text class=\"value\" x=\"%.0f\" y=\"%.1f\">%.0f %%</text>\n", x + BAR_W / 2.0,
            BASE_Y - FULL * at - 7, 100 * value);
}

static void put_group(FILE *svg, int at, const json_t *model, const char *path)
{
    double x = GROUP_X + at * GROUP_W, right = get_number(model, "right", path);
    double sure = get_number(model, "confident", path);
    double sure_wrong = get_number(model, "confident_wrong", path);
    put_bar(svg, x, 0, right, chart_color[0]);
    put_percent(svg, x, right, right);
    x += BAR_W + GAP;
    put_bar(svg, x, 0, sure - sure_wrong, chart_color[1]);
    put_bar(svg, x, sure - sure_wrong, sure, chart_color[2]);
    put_percent(svg, x, sure, sure);
    fprintf(svg, "<text class=\"name\" x=\"%.0f\" y=\"%d\">%s</text>\n", x - GAP / 2.0, BASE_Y + 26,
            get_text(model, "name", path));
}

static void put_frame(FILE *svg, int width)
{
    static const char *const legend[] = { "right", "confident and right", "confident and wrong" };
    static const int legend_x[] = { 0, 84, 264 };
    for (int i = 0; i < 3; i++)
        fprintf(svg,
                "<rect x=\"%d\" y=\"53\" width=\"13\" height=\"13\" fill=\"%s\"/>"
                "<text x=\"%d\" y=\"64\">%s</text>\n",
                GROUP_X + legend_x[i], chart_color[i], GROUP_X + legend_x[i] + 20, legend[i]);
    for (int percent = 0; percent <= 100; percent += 25) {
        double y = BASE_Y - FULL * percent / 100.0;
        fprintf(svg, "<path class=\"grid\" d=\"M%d %.1fH%d\"/>", GROUP_X - 20, y, width - 20);
        fprintf(svg, "<text class=\"tick\" x=\"%d\" y=\"%.1f\">%d</text>\n", GROUP_X - 28, y + 4,
                percent);
    }
}

static json_t *read_summary(const char *path)
{
    json_error_t error;
    json_t *summary = json_load_file(path, 0, &error);
    if (!summary) die("%s:%d: %s", path, error.line, error.text);
    if (!json_array_size(json_object_get(summary, "models"))) die("%s: no models", path);
    return summary;
}

static void chart(const char *from, const char *to)
{
    json_t *summary = read_summary(from);
    const json_t *models = json_object_get(summary, "models");
    int n = (int)json_array_size(models);
    int width = GROUP_X + (n > 3 ? n : 3) * GROUP_W;
    FILE *svg = fopen(to, "wb");
    if (!svg) die("%s: %s", to, strerror(errno));
    fprintf(svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
            "role=\"img\" aria-label=\"right and confident answers of each model, percent\">\n"
            "<style>text{font:14px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;"
            "fill:#7a8490}.title{font-size:18px;font-weight:600}.name{font-size:15px;"
            "font-weight:600;text-anchor:middle}.value{font-weight:600;text-anchor:middle}"
            ".tick{font-size:12px;text-anchor:end}.grid{stroke:#7a8490;stroke-opacity:.3}"
            "</style>\n"
            "<text class=\"title\" x=\"%d\" y=\"30\">Answers to held-out questions, percent of "
            "%.0f</text>\n",
            width, CHART_H, width, GROUP_X,
            get_number(json_array_get(models, 0), "questions", from));
    put_frame(svg, width);
    for (int i = 0; i < n; i++) put_group(svg, i, json_array_get(models, (size_t)i), from);
    fputs("</svg>\n", svg);
    close_written(svg, to);
    json_decref(summary);
}

static void table(const char *from)
{
    json_t *summary = read_summary(from), *model;
    size_t i;
    puts("| model | right % | confident % | confident and wrong % | tokens | KL to SFT |"
         " reward by experts | reward by lay people |\n|---|--:|--:|--:|--:|--:|--:|--:|");
    json_array_foreach(json_object_get(summary, "models"), i, model)
        printf("| `%s` | %.1f | %.1f | %.1f | %.2f | %.2f | %.2f | %.2f |\n",
               get_text(model, "name", from), 100 * get_number(model, "right", from),
               100 * get_number(model, "confident", from),
               100 * get_number(model, "confident_wrong", from),
               get_number(model, "mean_length", from), get_number(model, "kl", from),
               get_number(model, reward_key[0], from), get_number(model, reward_key[1], from));
    print_crowd(json_object_get(summary, "crowd"),
                "\n| in the crowd | annotators | reliability found, mean | lowest | highest |\n"
                "|---|--:|--:|--:|--:|\n",
                "| %s | %d | %.2f | %.2f | %.2f |\n");
    json_decref(summary);
}

/* ============================================================================================
 * MARK: - 08 MAIN
 * ============================================================================================ */

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "generate")) generate(argv[2]);
    else if (argc > 2 && !strcmp(argv[1], "judge")) judge(argc - 2, argv + 2);
    else if (argc == 4 && !strcmp(argv[1], "chart")) chart(argv[2], argv[3]);
    else if (argc == 3 && !strcmp(argv[1], "table")) table(argv[2]);
    else {
        fputs("usage: demo-tool generate DIR\n"
              "       demo-tool chart SUMMARY SVG\n"
              "       demo-tool table SUMMARY\n"
              "       demo-tool judge --out SUMMARY (--model NAME --gens FILE --expert FILE\n"
              "                       --lay FILE --eval FILE --dir DIR)...\n", stderr);
        return 2;
    }
    return 0;
}
