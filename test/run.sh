#!/bin/sh
# Runs test programs, several at a time, and adds up what they report.
#   run.sh [-j JOBS] [-f NAMES] [-w WRAPPER] [-t NAME] PROGRAM...
# JOBS programs run at a time, those called NAMES first. WRAPPER starts each program (an emulator, an
# interpreter); NAME goes to the programs as their filter. What a program prints is shown as a whole, in the order
# of the arguments. A program that ends without its closing line counts as one failure, unless it is
# an example: a program of a library user, whose exit status is its whole result.

jobs=1 first= wrapper= filter=
while getopts j:f:w:t: option; do
    case $option in
    j) jobs=$OPTARG ;;
    f) first=$OPTARG ;;
    w) wrapper=$OPTARG ;;
    t) filter=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))

tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# The programs that have a test of that name, a line each.
wanted() {
    for program; do
        case ${program##*/} in
        example*) case ${program##*/} in *"$filter"*) ;; *) continue ;; esac ;;
        *.py) ;; # has no list to ask for
        *) [ -z "$filter" ] || [ "$($wrapper "$program" --list "$filter")" ] || continue ;;
        esac
        printf '%s\n' "$program"
    done
}

# The numbers of these lines in the order of their start.
order() {
    awk -v first=" $first " '{ n = split($0, part, "/"); later = !index(first, " " part[n] " ")
                               print later, NR }' "$tmp/programs" | sort -n | cut -d ' ' -f 2
}

# Runs the program of that line; its output goes to N.out, then its exit status to N.status.
run='
    program=$(sed -n "$1p" "$tmp/programs")
    case ${program##*/} in example*) filter= ;; esac
    $wrapper "$program" $filter >"$tmp/$1.out" 2>&1
    echo $? >"$tmp/$1.code"
    mv "$tmp/$1.code" "$tmp/$1.status"
    echo "$1"
'

# Shows what the N-th program printed, without its closing line, and counts.
show() {
    name=${program##*/} code=$(cat "$tmp/$1.status" 2>/dev/null) p=0 f=1 s=0
    printf '%s\n' "$name"
    closing='^[0-9]* passed, [0-9]* failed\(, [0-9]* skipped\)\{0,1\}$'
    sed "/$closing/d" "$tmp/$1.out"
    case $name in
    example*) [ "$code" != 0 ] || { p=1 f=0; } ;;
    *)
        counts=$(sed -n "/$closing/p" "$tmp/$1.out" | tr -d a-z,)
        # The counts are void when the program died, whatever it printed before.
        if [ -z "$counts" ]; then
            echo "$name: ended with status $code before its closing line"
        else
            read -r p f s <<END
$counts
END
            [ "$code" = 0 ] || [ "$f" -gt 0 ] || { f=1; echo "$name: all passed, yet status $code"; }
        fi
        ;;
    esac
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + ${s:-0}))
    [ "$f" = 0 ] || broken="$broken $name"
}

# Reads the numbers of programs that have ended, and shows each program after those before it.
report() {
    passed=0 failed=0 skipped=0 broken= n=1
    while read -r program <&3; do
        while [ ! -e "$tmp/$n.status" ] && read -r ended; do :; done
        show $n
        n=$((n + 1))
    done 3<"$tmp/programs"
    [ -z "$broken" ] || printf 'failures in:%s\n' "$broken"
    printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
    [ "$failed" = 0 ]
}

wanted "$@" >"$tmp/programs"
[ -s "$tmp/programs" ] || { echo "no test matches \"$filter\""; exit 1; }
export tmp wrapper filter
order | xargs -n 1 -P "$jobs" sh -c "$run" run | report
