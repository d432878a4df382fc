# Makes two files of rlhf.c, so that tests see what is private in it and yet it is compiled once:
#
#   awk -f test/inside.awk rlhf.c              the code, with nothing in it private
#   awk -v view=1 -f test/inside.awk rlhf.c    what a test includes: functions without their bodies
#
# Both hold what is always inlined, and constants: weak in the view, so that the linker makes them one.
# What has to be understood of C is little, since test/check.awk holds rlhf.c to its form: definitions
# begin at column 1 and end with a brace there.

# Reports name the lines of rlhf.c.
BEGIN { if (!view) print "#line 1 \"rlhf.c\"" }

# The rest of a function of which the view has shown the head.
skip { skip = !/^}/; next }

view && /STB_DS_IMPLEMENTATION/ { next }

# Kernels begin with a macro.
/^#define K_FN / { sub(/ static$/, "") }

# Preprocessor lines, comments and inner lines; types, inlined functions, other macros.
head == "" && (/^[^A-Za-z_]/ || /^$/ || /^(typedef|enum|struct|static inline|_Static_assert)/ ||
               (/^[A-Z]/ && !/^(K_FN|GEMM_|RLHF_PRINTF)/)) { print; next }

# A definition up to the end of a line at which it is known what it is.
{
    head = head (head == "" ? "" : "\n") $0
    code = $0
    sub(/ *\/\*.*\*\/$/, "", code)
    if (code !~ /[;{}]$/) next
    if (match(head, /^[^={]*\) ?\{/)) {
        if (view) {
            skip = head !~ /}$/
            head = substr(head, 1, RLENGTH - 1) ";"
        }
        sub(/static /, "", head)
    } else sub(/static /, !view ? "" : head ~ /const / ? "__attribute__((weak)) " : "extern ", head)
    print head
    head = ""
}
