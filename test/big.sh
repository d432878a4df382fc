#!/bin/sh
# What the three stages take of memory on models of published shapes, with random bf16 weights:
#
#   big.sh [llama-1b] [qwen-0.5b] [llama-small] [qwen-small]      (default: the small ones)
#
# LoRA fine-tuning on 512 tokens; a LoRA reward model on pairs of that length, which prefers one half of the words to
# the other; PPO with policy, reference, value and reward model, from the fine-tuned model: one with random weights
# draws any of its tokens, of which hardly one comes twice, so that there is nothing to learn from. Each takes real
# optimizer steps. Its loss has to fall or its reward to rise: on the same four prompts, from the first update, sampled
# before any step, to the mean of the last two, by a tenth of the standard deviation that rewards are normalised to.
# The peak of resident memory (/usr/bin/time -v) has to be below the limit of its shape and within 10 % of the table
# that the program shows before it starts.
# BUILD and PROG are those of the Makefile; STAGES="sft rm" leaves PPO out, which needs both. Ends with "N passed, N failed".

cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build} prog=${PROG:-./rlhf} assets=../shared/assets/tokenizers
case $prog in */*) ;; *) prog=./$prog ;; esac
dir=$(mktemp -d "$PWD/$build/big.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0

check() { # name, condition as an awk expression
    if awk "BEGIN { exit !($2) }"; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "  FAILED $1: $2"
}

# Lines of random words: of all, the first or the second half of them; $2 words, $3 lines, seed $4.
words() {
    awk -v which="$1" -v n="$2" -v lines="$3" -v seed="$4" '
        function draw() { seed = (seed * 16807) % 2147483647; return from + seed % count }
        BEGIN {
            count = split("the river runs by an old stone house where birds sing in morning light and people " \
                          "walk home along a road with bread milk water trees", word, " ")
            from = which == "second" ? int(count / 2) + 1 : 1
            if (which != "all") count = int(count / 2)
            for (l = 0; l < lines; l++) {
                line = ""
                for (i = 0; i < n; i++) line = line (i ? " " : "") word[draw()]
                print line
            }
        }'
}

# A command of the program with what it takes at most: sets $peak and $table, in bytes.
run() { # stage, its options...
    stage=$1
    case " ${STAGES:-sft rm ppo} " in *" $stage "*) ;; *) return ;; esac
    shift
    out=$dir/$shape-$stage
    /usr/bin/time -v -o "$dir/time" "$prog" "$stage" --out "$out" --json --seed 1 --logging_steps 1 \
        --use_peft --lora_target_modules all-linear --lora_dropout 0 "$@" >"$dir/json" 2>"$dir/log" || {
        failed=$((failed + 1))
        echo "  FAILED $shape $stage"
        cat "$dir/log"
        return 1
    }
    peak=$(awk '/Maximum resident/ { print $NF * 1024 }' "$dir/time")
    table=$(sed -n 's/.*"memory": *{[^}]*"total": *\([0-9]*\).*/\1/p' "$dir/json")
    seconds=$(awk '/Elapsed/ { n = split($NF, t, ":"); s = 0; for (i = 1; i <= n; i++) s = 60 * s + t[i]; print s }' "$dir/time")
    key='"loss"' last=1
    [ "$stage" = ppo ] && key='"objective/scores"' last=2
    went=$(sed -n "s|.*$key: *\([-0-9.e]*\).*|\1|p" "$out/metrics.jsonl" | awk -v last=$last '
        { x[NR] = $1 }
        END { for (i = NR - last + 1; i <= NR; i++) sum += x[i]; print x[1], sum / last }')
    awk -v n="$shape $stage" -v p="$peak" -v t="${table:-0}" -v l="$limit" -v s="$seconds" -v w="$went" 'BEGIN {
        split(w, x, " ")
        printf "%-18s %8.2f GB %8.2f GB %6s   %10.4f %10.4f %7.0f s\n", n, p / 1e9, t / 1e9, l ? l " GB" : "-", x[1], x[2], s }'
    set -- $went
    check "$shape $stage, learns" "${2:-0} $([ "$stage" = ppo ] && echo '> 0.1 +' || echo '<') ${1:-0}"
    check "$shape $stage, within 10 % of the table" "${table:-0} > 0 && $peak < 1.1 * ${table:-0} && $peak > 0.9 * ${table:-0}"
    [ "$limit" = 0 ] || check "$shape $stage, limit" "$peak < 1e9 * $limit"
}

model() { # shape, tokenizer of the assets
    shape=$1
    base=$dir/$shape
    "$dir/big_model" "$shape" 0 "$base" >/dev/null || exit 1
    if [ "${shape%small}" = "$shape" ] && [ -d "$assets/$2" ]; then
        cp "$assets/$2"/tokenizer*.json "$base/"
    else
        "$prog" tokenizer --train README.md --vocab_size 1024 --out "$base/words" --quiet >"$dir/log" && cp "$base"/words/* "$base/"
    fi
    chmod u+w "$base"/*
    # Words for 512 tokens, an end token included.
    tokens=$(words all 200 1 7 | "$prog" tokenize --tokenizer "$base" | wc -w)
    n=$((200 * 490 / tokens))
    words all $n 8 11 | sed 's/.*/{"text": "&"}/' >"$dir/sft.jsonl"
    words all $((n / 2)) 8 13 | sed 's/.*/{"prompt": "&"/' >"$dir/prompt"
    words first $((n / 4)) 8 17 | sed 's/.*/, "chosen": " &"/' >"$dir/chosen"
    words second $((n / 4)) 8 19 | sed 's/.*/, "rejected": " &"}/' >"$dir/rejected"
    paste -d '\0' "$dir/prompt" "$dir/chosen" "$dir/rejected" >"$dir/rm.jsonl"
    words all 8 4 23 | sed 's/.*/{"prompt": "&"}/' >"$dir/ppo.jsonl"
}

cc -O2 -std=gnu11 -o "$dir/big_model" test/big_model.c -lm || exit 1
printf '%-18s %11s %11s %6s   %10s %10s %9s\n' stage peak table limit 'at first' 'at last' took
shapes=${*:-llama-small qwen-small}
for shape in $shapes; do
    case $shape in
    llama-*) model "$shape" llama-3.2 ;;
    qwen-*) model "$shape" qwen2.5 ;;
    *) echo "big.sh: no shape $shape"; exit 2 ;;
    esac
    case $shape in
    llama-1b) steps="4 2 3" rate=5e-4 sft=4.0 rm=4.0 ppo=5.0 ;;
    qwen-0.5b) steps="6 3 4" rate=5e-4 sft=2.5 rm=2.5 ppo=2.5 ;;
    *) steps="6 3 4" rate=1e-3 sft=0 rm=0 ppo=0 ;;
    esac
    set -- $steps
    limit=$sft
    run sft --model "$base" --data "$dir/sft.jsonl" --max_length 512 --per_device_train_batch_size 1 --max_steps "$1" \
        --learning_rate 1e-3 --lr_scheduler_type constant --memory_limit "$limit"
    limit=$rm
    run rm --model "$base" --data "$dir/rm.jsonl" --max_length 512 --per_device_train_batch_size 1 --max_steps "$2" \
        --learning_rate 1e-3 --normalize_samples 8 --response_length 16 --memory_limit "$limit"
    limit=$ppo
    run ppo --model "$dir/$shape-sft" --reward "$dir/$shape-rm" --data "$dir/ppo.jsonl" --batch_size 16 --response_length 8 \
        --max_steps "$3" --num_ppo_epochs 1 --learning_rate "$rate" --lr_scheduler_type constant --kl_coef 0 \
        --temperature 0.2 --memory_limit "$limit"
    rm -rf "$dir/$shape"*
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
