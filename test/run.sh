#!/bin/sh
# Runs test programs one after the other and adds up what they report.
#   run.sh [-w WRAPPER] [-t NAME] PROGRAM...
# WRAPPER starts each program (an emulator); NAME goes to the programs as their filter.
# A program that ends without its closing line counts as one failure, unless it is an example:
# a program of a library user, whose exit status is its whole result.

wrapper= filter=
while getopts w:t: option; do
    case $option in
    w) wrapper=$OPTARG ;;
    t) filter=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))

passed=0 failed=0 skipped=0 broken=
status=$(mktemp) || exit 1
trap 'rm -f "$status"' EXIT

# Copies a program's output, except its closing line, whose three numbers go to the status file.
relay() {
    while IFS= read -r line; do
        case $line in
        [0-9]*' passed, '[0-9]*' failed, '[0-9]*' skipped') echo "$line" | tr -d a-z, >>"$status" ;;
        *) printf '%s\n' "$line" ;;
        esac
    done
}

for program; do
    name=${program##*/}
    case $name in
    example*)
        case $name in *"$filter"*) ;; *) continue ;; esac
        printf '%s\n' "$name"
        if $wrapper "$program"; then p=1 f=0 s=0; else p=0 f=1 s=0; fi
        ;;
    *)
        : >"$status"
        if [ -n "$filter" ]; then
            [ "$($wrapper "$program" --list "$filter")" ] || continue
        fi
        printf '%s\n' "$name"
        { $wrapper "$program" $filter; echo "exit $?" >>"$status"; } 2>&1 | relay
        p=0 f=0 s=0 code=$(sed -n 's/^exit //p' "$status")
        read -r p f s <<EOF
$(grep -v exit "$status")
EOF
        # The counts are void when the program died, whatever it printed before.
        [ -n "$s" ] || { p=0 f=1 s=0; echo "$name: ended with status $code before its closing line"; }
        [ "$code" = 0 ] || [ "$f" -gt 0 ] || { f=1; echo "$name: all passed, yet status $code"; }
        ;;
    esac
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    [ "$f" = 0 ] || broken="$broken $name"
done

[ $((passed + failed + skipped)) -gt 0 ] || { echo "no test matches \"$filter\""; exit 1; }
[ -z "$broken" ] || printf 'failures in:%s\n' "$broken"
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]
