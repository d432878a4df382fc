#!/bin/sh
# README.md, held to what it says:
#
#   listing   its C program is test/example_ppo.c
#   commands  every ```sh block runs, from top to bottom, in a directory that has what the text
#             speaks of: the program, the library, base-model, and files made of the lines in its
#             table of record forms
#   targets   every `make` target it names exists; what ```console blocks show is run by .ci/run
#   options   every --option it names is known to the program
#   links     every file it refers to exists
#   results   its table and data/demo.svg are those of build/demo, if `make demo` has been run
#
# Speaks as test/test.h does: [NAME] [--list], and a closing line that test/run.sh adds up.
# `readme.sh -u` writes the listing, the table and the picture into README.md and data/.
# BUILD and PROG are those of the Makefile.

cd "$(dirname "$0")/.." || exit 1
root=$(pwd)
build=${BUILD:-build} prog=${PROG:-rlhf}
case $build in /*) ;; *) build=$root/$build ;; esac
case $prog in /*) ;; *) prog=$root/$prog ;; esac
demo=${DEMO_OUT:-build/demo}
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# The fenced blocks of a language, in order.
blocks() {
    awk -v open="\`\`\`$1" '$0 == open { on = 1; next } /^```/ { on = 0 } on' README.md
}

# What stands between the marks that enclose the demo's table.
shown_table() {
    sed -n '/<!-- demo -->/,/<!-- end -->/p' README.md | sed '1d;$d'
}

# The records in the table of forms whose first column names a command.
records() {
    awk -F'|' -v name="\`$1\`" '/^\|/ && index($2, name) {
        from = index($0, "`{"); to = length($0)
        while (to > from && substr($0, to - 1, 2) != "}`") to--
        if (from && to > from) print substr($0, from + 1, to - from - 1)
    }' README.md
}

check_listing() {
    blocks c | diff test/example_ppo.c - && return
    echo "the C block differs from test/example_ppo.c (test/readme.sh -u takes it over)"
    return 1
}

# The files that the commands read. The texts are this repository's, the model is as small as can be.
prepare() {
    mkdir -p "$1/build" && ln -s "$root/rlhf.h" "$root/data" "$root/test" "$1/" &&
        ln -s "$prog" "$1/rlhf" && ln -s "$build/librlhf.a" "$1/build/" &&
        cp README.md "$1/text.txt" || return
    cat >"$1/config.json" <<END
{"model_type": "llama", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1,
 "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512}
END
    records sft >"$1/sft.jsonl"
    records rm >"$1/prefs.jsonl"
    records ppo >"$1/prompts.jsonl"
    records raters >"$1/judged.jsonl"
    for file in sft prefs prompts judged; do
        [ "$(grep -c . "$1/$file.jsonl")" -ge 2 ] || { echo "no records for $file.jsonl"; return 1; }
    done
    (cd "$1" && ./rlhf tokenizer --train text.txt --vocab_size 512 --out words &&
        ./rlhf sft --init config.json --tokenizer words --data sft.jsonl --out base-model) \
        >"$1/prepare.log" 2>&1 || { cat "$1/prepare.log"; return 1; }
}

check_commands() {
    rm -rf "$tmp/run"
    prepare "$tmp/run" || return
    blocks sh >"$tmp/run/commands.sh"
    grep -q './rlhf ppo' "$tmp/run/commands.sh" || { echo "no commands found"; return 1; }
    if ! (cd "$tmp/run" && sh -eux commands.sh >out 2>err </dev/null); then
        echo "a command failed:"
        tail -n 5 "$tmp/run/err"
        return 1
    fi
    # The example's rewards, which it prints, have to rise.
    awk '$1 == "reward" { if (!n++) first = $2; last = $2 }
         END { if (n < 2 || !(last > 2 * first)) { print "the example learns nothing"; exit 1 } }' \
        "$tmp/run/out"
}

check_targets() {
    blocks console >"$tmp/console"
    { grep -o '`make [a-z-]*`' README.md | tr -d '`'; grep '^make ' "$tmp/console"; } | sort -u |
        while read -r _ target _; do
            grep -q "^$target:" Makefile || { echo "make $target: no such target"; exit 1; }
        done || return
    while read -r first second _; do
        case $first in
        make) grep -q "make $second\$" .ci/run || { echo "make $second is not in .ci/run"; return 1; } ;;
        git | cd) ;;
        *) echo "a console block shows \"$first\", which nothing runs"; return 1 ;;
        esac
    done <"$tmp/console"
}

check_options() {
    for command in sft rm ppo generate chat score eval raters label report export tokenize tokenizer bench info; do
        "$prog" "$command" --help
    done | grep -o -e '--[a-z][a-z_0-9]*' | sort -u >"$tmp/known"
    grep -o -e '`--[a-z][a-z_-]*' README.md | tr -d '`' | tr - _ | sed 's/^__/--/' | sort -u |
        grep -vxF -f "$tmp/known" >"$tmp/unknown"
    [ ! -s "$tmp/unknown" ] || { echo "unknown options:"; cat "$tmp/unknown"; return 1; }
}

check_links() {
    { grep -o '](\([^)#]*\))' README.md | sed 's/^](//; s/)$//'
      grep -o 'src="[^"]*"' README.md | sed 's/^src="//; s/"$//'
      grep -o '`\(test\|data\|bench\)/[A-Za-z_0-9./]*`' README.md | tr -d '`'; } | sort -u |
        grep -v '^https*:' | while read -r file; do
            [ -e "$file" ] || { echo "$file does not exist"; exit 1; }
        done
}

check_results() {
    if [ ! -f "$demo/summary.json" ] || [ ! -x "$build/demo-tool" ]; then
        skipped="no $demo/summary.json: \`make demo\` writes it"
        return
    fi
    "$build/demo-tool" table "$demo/summary.json" >"$tmp/table"
    "$build/demo-tool" chart "$demo/summary.json" "$tmp/chart.svg"
    shown_table | diff "$tmp/table" - && cmp "$tmp/chart.svg" data/demo.svg && return
    echo "README.md or data/demo.svg shows another run (test/readme.sh -u takes this one over)"
    return 1
}

update() {
    awk -v table="$tmp/table" '
        function copy(file, line) { while ((getline line < file) > 0) print line }
        $0 == "```c" { print; copy("test/example_ppo.c"); skip = 1; next }
        $0 == "<!-- demo -->" && table { print; copy(table); skip = 1; next }
        /^```$/ || $0 == "<!-- end -->" { skip = 0 }
        !skip' README.md >"$tmp/README.md" && cat "$tmp/README.md" >README.md
}

if [ "$1" = -u ]; then
    : >"$tmp/table"
    if [ -f "$demo/summary.json" ]; then
        "$build/demo-tool" table "$demo/summary.json" >"$tmp/table" &&
            "$build/demo-tool" chart "$demo/summary.json" data/demo.svg || exit 1
    else
        shown_table >"$tmp/table"
    fi
    update
    exit
fi

filter= list=
for argument; do
    case $argument in --list) list=1 ;; *) filter=$argument ;; esac
done
passed=0 failed=0 skips=0
for name in listing commands targets options links results; do
    case readme_$name in *"$filter"*) ;; *) continue ;; esac
    if [ "$list" ]; then
        echo "readme_$name"
        continue
    fi
    skipped=
    if ! check_$name >"$tmp/report"; then
        failed=$((failed + 1))
        printf '  %-40s FAILED\n' "readme_$name"
        sed 's/^/    /' "$tmp/report"
    elif [ "$skipped" ]; then
        skips=$((skips + 1))
        printf '  %-40s skipped: %s\n' "readme_$name" "$skipped"
    else
        passed=$((passed + 1))
        printf '  %-40s ok\n' "readme_$name"
    fi
done
[ "$list" ] || echo "$passed passed, $failed failed, $skips skipped"
[ "$failed" = 0 ]
