# The rules that `make check` holds rlhf.c to. Two uses, both in the Makefile:
#
#   awk -f test/check.awk rlhf.c rlhf.h OTHER...     the text: structure of rlhf.c, layout of all
#   nm ... | awk -v symbols=1 -f test/check.awk      the symbols of the library's object
#
# What rlhf.c looks like, as far as this script reads it:
#
#   * The first comment holds the table of contents, one line a section, as in
#        " *   08 GEMM (gemm_)   what it is for": number, name, every prefix in one pair of parentheses
#     (several are separated by spaces or commas).
#   * A section opens with a banner at column 1: "/* ====", then " * MARK: - 08 GEMM (gemm_)" with
#     the same number, name and prefixes as in the table, any text, and " * ==== */".
#   * A function ends with a brace at column 1, its body is indented.
#
# Plain awk on purpose (mawk, gawk, BSD): it runs wherever the compiler runs.

BEGIN {
    MAX_LINE = 100        # columns
    MAX_FUNCTION = 120    # lines, from the line of its return type to the closing brace
    MAX_WISHED = 60       # longer ones are counted, not refused
    MAX_SECTION = 1000    # lines, from banner to banner

    ID = "[A-Za-z_][A-Za-z_0-9]*"
    START = "(^|[^A-Za-z_0-9])"   # what stands before a whole word, and after it
    END_WORD = "($|[^A-Za-z_0-9])"

    # A library neither ends nor prints over its host, and is not steered by its environment.
    BANNED = START "(exit|_exit|_Exit|quick_exit|abort|assert|atexit|v?f?printf|puts|putchar" \
             "|perror|getenv|setenv|putenv|system|signal)[ ]*[(]"
    STREAMS = START "(stdout|stderr|stdin)" END_WORD
    NO_SYMBOL = "^(_?exit|_Exit|quick_exit|abort|atexit|(__)?v?f?printf(_chk)?|puts|putchar" \
                "|perror|(secure_)?getenv|setenv|putenv|system|signal|__assert_fail|__assert_rtn" \
                "|stdout|stderr|stdin)$"

    # x86 and Arm intrinsics, their types and headers.
    INTRINSIC = START "(_mm[0-9]*_[a-z]|__m(128|256|512)" \
                "|(float|u?int|bfloat|poly)(8|16|32|64)x[0-9]" \
                "|v(ld|st|add|sub|mul|div|fm|ml|dup|mov|max|min|abs|neg|cvt|rnd|get|set|reinterpret" \
                "|and|orr|eor|bsl|shl|shr|sr|zip|uzp|trn|ext|cge|cgt|cle|clt|ceq|padd|padal|rev" \
                "|combine|create|sqrt|recp|tbl|bf|q)[a-z0-9]*_[a-z0-9_]*[fsup](8|16|32|64))"
    SIMD_HEADER = "^[ ]*#[ ]*include[ ]*<(.*intrin|arm_neon|arm_sve|arm_bf16)[.]h>"

    UNEVEN = "the banner's rule differs from the first banner's"
    errors = 0
}

function complain(line, text) {
    printf "%s:%d: %s\n", FILENAME, line, text
    errors++
}

# The files of tests that a banner names are there.
function named(text,    path, line) {
    while (match(text, /test\/[a-z_]+[.][a-z]+/)) {
        path = substr(text, RSTART, RLENGTH)
        text = substr(text, RSTART + RLENGTH)
        if ((getline line < path) < 0) complain(FNR, path " is not there")
        close(path)
    }
}

# ---- Symbols -------------------------------------------------------------------------------------

# nm prints "address kind name" for what is defined and "U name" for what is not; macOS puts an
# underscore before every name.
symbols {
    name = $NF
    if (NF == 2 && ($1 == "U" || $1 == "w")) {
        if (name ~ NO_SYMBOL || (substr(name, 1, 1) == "_" && substr(name, 2) ~ NO_SYMBOL)) {
            printf "rlhf.o: calls %s: the library reports by status and hooks instead\n", name
            errors++
        }
    } else if (NF >= 3 && name !~ /^_?rlhf_/) {
        printf "rlhf.o: %s is visible to the host: make it static or name it rlhf_*\n", name
        errors++
    }
    next
}

# ---- Every file ----------------------------------------------------------------------------------

FNR == 1 { engine = (FILENAME ~ /(^|\/)rlhf[.]c$/) }

{
    sub(/\r$/, " ")
    width = $0
    gsub(/[\200-\277]/, "", width)   # a UTF-8 character is one column: count its first byte only
    if (length(width) > MAX_LINE)
        complain(FNR, "line of " length(width) " columns (limit " MAX_LINE ")")
    if ($0 ~ /[ \t]$/) complain(FNR, "trailing white space")
    if (engine && /Tests: test\//) named($0)
    if (index($0, "\t")) complain(FNR, "tab (indent with 4 spaces)")
}

!engine { next }

# ---- rlhf.c: from text to code -------------------------------------------------------------------

# Splits a line: `code` is left without comments and with empty strings, `comment` is the comments'
# text. A comment that goes on is remembered in `inside`.
function split_line(text,    at, what, rest) {
    code = comment = ""
    while (text != "") {
        if (inside) {
            at = index(text, "*/")
            if (!at) { comment = comment text; return }
            comment = comment substr(text, 1, at - 1)
            text = substr(text, at + 2)
            inside = 0
            continue
        }
        if (!match(text, /"|'|\/\*|\/\//)) { code = code text; return }
        code = code substr(text, 1, RSTART - 1)
        what = substr(text, RSTART, RLENGTH)
        rest = substr(text, RSTART + RLENGTH)
        if (what == "/*") { inside = 1; code = code " "; text = rest }
        else if (what == "//") { comment = comment rest; return }
        else {
            # The literal ends at the first such quote that no backslash escapes.
            code = code what what
            while (match(rest, /[\\"']/)) {
                at = substr(rest, RSTART, 1)
                rest = substr(rest, RSTART + (at == "\\" ? 2 : 1))
                if (at == what) break
            }
            text = rest
        }
    }
}

# A banner's or the table's text to "NN NAME (prefixes)", with single spaces, or "" if it is not one.
function heading(text,    close_at, head) {
    if (text !~ /^[0-9][0-9] +[A-Z][A-Z0-9]* +[(][A-Za-z0-9_, ]+[)]/) return ""
    close_at = index(text, ")")
    head = substr(text, 1, close_at)
    gsub(/,/, " ", head)
    gsub(/ +/, " ", head)
    gsub(/[(] /, "(", head)
    gsub(/ [)]/, ")", head)
    return head
}

function close_section(last,    n) {
    n = last - section_line + 1
    if (section && n > MAX_SECTION)
        complain(section_line, "section " section_head " has " n " lines (limit " MAX_SECTION ")")
}

function open_section(head,    part) {
    close_section(FNR - 2)
    if (head_before != "" && substr(head, 1, 2) + 0 <= substr(head_before, 1, 2) + 0)
        complain(FNR, "section " head " stands after " head_before)
    head_before = section_head = head
    section_line = FNR - 1
    sections++
    section = head
    sub(/^[0-9]+ /, "", section)
    sub(/ .*/, "", section)
    prefixes = head
    sub(/^[^(]*[(]/, "", prefixes)
    sub(/[)]$/, "", prefixes)
    banner[sections] = head
    banner_line[sections] = FNR
}

function has_prefix(name,    n, i, part) {
    n = split(prefixes, part, " ")
    for (i = 1; i <= n; i++)
        if (index(name, part[i]) == 1) return 1
    return 0
}

# The banner's three kinds of line. Prints what is wrong with it; opens the section.
function read_banner(    head, text) {
    if ($0 ~ /^\/\* =+$/) {
        rule = length($0) - 3
        rule_line = FNR
        if (first_rule == 0) first_rule = rule
        if (rule < 40 || rule != first_rule) complain(FNR, UNEVEN)
    } else if (index($0, "MARK:")) {
        head = ""
        if (index($0, " * MARK: - ") == 1) { text = substr($0, 12); head = heading(text) }
        if (head == "" || rule_line != FNR - 1)
            complain(FNR, "a banner is \"/* ====\", then \" * MARK: - NN NAME (prefix_)\"")
        else if (head != text)
            complain(FNR, "the banner's line is \" * MARK: - " head "\", nothing more")
        if (head != "") { open_section(head); open_banner = FNR }
    } else if ($0 ~ /^ \* =+ \*\/$/) {
        if (length($0) - 6 != first_rule) complain(FNR, UNEVEN)
        open_banner = 0
    } else if (open_banner && !inside) {
        complain(open_banner, "the banner's last line is \" * ==== */\"")
        open_banner = 0
    }
}

# ---- rlhf.c: preprocessor ------------------------------------------------------------------------

# Follows RLHF_MAIN through the conditionals: `program` is non-zero in the part that only it has.
function conditional(    word) {
    word = code
    sub(/^[ ]*#[ ]*/, "", word)
    if (word ~ /^if/) {
        depth_if++
        in_program[depth_if] = 0
        if (word ~ /^if(def| +defined)[ (]*RLHF_MAIN/) in_program[depth_if] = 1
        else if (word ~ /^if(ndef| +!defined)[ (]*RLHF_MAIN/) in_program[depth_if] = -1
        if (word ~ /^if +0($|[^A-Za-z_0-9x.])/) complain(FNR, "#if 0: delete it, git remembers")
    } else if (word ~ /^el/) in_program[depth_if] = -in_program[depth_if]
    else if (word ~ /^endif/) depth_if--
    if (word ~ /^define/) {
        macro = word
        sub(/^define +/, "", macro)
        match(macro, ID)
        macro = substr(macro, RSTART, RLENGTH)
    }
    program = 0
    for (word = 1; word <= depth_if; word++) if (in_program[word] > 0) program = 1
}

# ---- rlhf.c: functions ---------------------------------------------------------------------------

# Removes "NAME((...))" and "NAME(...)" for the given word, parentheses balanced.
function without(text, word,    at, i, level, c, tail) {
    while (match(text, START word "[ ]*[(]")) {
        at = RSTART
        tail = substr(text, RSTART + RLENGTH)
        level = 1
        for (i = 1; i <= length(tail) && level; i++) {
            c = substr(tail, i, 1)
            if (c == "(") level++
            else if (c == ")") level--
        }
        text = substr(text, 1, at - 1) " " substr(tail, i)
    }
    return text
}

# The name before the last parameter list of a declaration, "" if that is no function's.
function function_name(text,    i, level, c) {
    text = without(text, "__attribute__")
    sub(/[ ]+$/, "", text)
    if (text !~ /[)]$/ || text ~ /(^|[^A-Za-z_0-9])typedef[^A-Za-z_0-9]/) return ""
    level = 0
    for (i = length(text); i > 0; i--) {
        c = substr(text, i, 1)
        if (c == ")") level++
        else if (c == "(" && --level == 0) break
    }
    text = substr(text, 1, i - 1)
    sub(/[ ]+$/, "", text)
    if (!match(text, ID "$")) return ""
    qualifiers = substr(text, 1, RSTART - 1)
    return substr(text, RSTART)
}

# Whether the words before a function's name make it private, themselves or as a macro.
function is_static(    i, n, word) {
    n = split(qualifiers, word, /[^A-Za-z_0-9]+/)
    for (i = 1; i <= n; i++)
        if (word[i] == "static" || word[i] in means_static) return 1
    return 0
}

function open_function(name) {
    function_is = name
    functions++
    if (is_static()) {
        if (!section) complain(header_line, name ": a function before the first section")
        else if (!has_prefix(name)) complain(header_line, name ": section " section_head " has other prefixes")
    } else if (name == "main") {
        if (!program) complain(header_line, "main outside #ifdef RLHF_MAIN")
    } else if (name !~ /^rlhf_/) complain(header_line, name ": neither static nor rlhf_*")
    else if (!has_prefix(name)) complain(header_line, name ": a public function belongs in the section of rlhf_")
}

function close_function(    n) {
    n = FNR - header_line + 1
    lengths[functions] = n
    if (n > longest) { longest = n; longest_name = function_is }
    if (n > MAX_WISHED) wished++
    if (n > MAX_FUNCTION) complain(header_line, function_is ": " n " lines (limit " MAX_FUNCTION ")")
    function_is = ""
}

# A declaration at file level that ended with a semicolon.
function read_declaration(text,    name) {
    sub(/;[ ]*$/, "", text)
    text = without(text, "_?_?[Ss]tatic_assert")
    if (text ~ /=/) return
    name = function_name(text)
    if (name == "" || qualifiers !~ /[A-Za-z_]/) return
    complain(header_line, name ": a prototype; move the function above its first call")
}

# Follows braces. Only whole declarations at file level are looked at: `header` gathers them.
function read_code(text,    c) {
    if (text ~ /^}/) {
        if (function_is != "") close_function()
        depth = 0
        sub(/^}/, "", text)
        header = depth_before == "type" ? "}" : ""
        depth_before = ""
        if (text ~ /^[ ]*$/ || header == "") return
    }
    while (match(text, /[{};]/)) {
        c = substr(text, RSTART, 1)
        if (!depth) {
            if (header ~ /^[ ]*$/) header_start(text)
            header = header substr(text, 1, RSTART)
        }
        text = substr(text, RSTART + 1)
        if (c == "{") { if (!depth++) enter(substr(header, 1, length(header) - 1)) }
        else if (c == "}") {
            if (depth > 0 && !--depth) {
                if (function_is != "") { close_function(); header = "" }
                else header = header "}"
            }
        } else if (!depth) { read_declaration(header); header = "" }
    }
    if (!depth) {
        if (header ~ /^[ ]*$/) header_start(text)
        header = header text " "
    }
}

function header_start(text) { header = ""; if (text !~ /^[ ]*$/) header_line = FNR }

# A brace opened at file level: a function's body, or else a type or an initialiser.
function enter(text,    name) {
    name = text ~ /=/ ? "" : function_name(text)
    if (name != "") { open_function(name); header = ""; depth_before = "" }
    else depth_before = "type"
}

# ---- rlhf.c: line by line ------------------------------------------------------------------------

{
    first_comment = first_comment_open
    was_inside = inside
    split_line($0)
    if (FNR == 1) first_comment = first_comment_open = inside
    else if (first_comment_open && !inside) first_comment_open = 0

    if (code ~ /^[ ]*$/ && comment != "") comment_lines++
    else if (comment != "") comment_beside++
    total = FNR

    if (first_comment && match($0, /^ \* +/) && heading(substr($0, RLENGTH + 1)) != "") {
        toc[++entries] = heading(substr($0, RLENGTH + 1))
        toc_line[entries] = FNR
    }
    if (!first_comment && (comment != "" || open_banner)) read_banner()
    if (comment != "" && !first_comment) read_comment(comment)
    if (code ~ /^[ ]*$/) { if (!was_inside) continued = 0; next }

    directive = continued || code ~ /^[ ]*#/
    continued = directive && code ~ /\\$/
    if (code ~ /^[ ]*#/) conditional()

    if (!program) {
        if (code ~ BANNED) complain(FNR, found(BANNED) ": the library reports by status and hooks")
        else if (code ~ STREAMS) complain(FNR, found(STREAMS) ": the library has no console")
    }
    if (section != "VEC" && section != "TILE" && code ~ INTRINSIC)
        complain(FNR, found(INTRINSIC) "...: intrinsics stand in VEC and TILE only")
    if (section != "VEC" && section != "TILE" && section != "CONFIG" && code ~ SIMD_HEADER)
        complain(FNR, "SIMD headers are included in CONFIG, VEC or TILE")
    if (section != "PAR") {
        if (code ~ /^[ ]*#[ ]*pragma +omp/ || $0 ~ /_Pragma[ ]*[(][ ]*"omp/)
            complain(FNR, "OpenMP pragmas stand in PAR only")
        else if (code ~ (START "omp_[a-z]")) complain(FNR, "OpenMP calls stand in PAR only")
        else if (code ~ (START "(pthread_create|pthread_mutex_|pthread_cond_|atomic_)"))
            complain(FNR, "threads and atomics stand in PAR only")
    }
    if (code ~ (START "omp_set_num_threads"))
        complain(FNR, "omp_set_num_threads changes the host: use num_threads")

    if (!directive) read_code(code)
    else if (directive_is_static(code)) means_static[macro] = 1
}

# A macro is static if its text says so, itself or by another such macro.
function directive_is_static(code,    m) {
    if (code ~ (START "static" END_WORD)) return 1
    for (m in means_static) if (m != "" && code ~ (START m END_WORD)) return 1
    return 0
}

# The word that made a rule match.
function found(rule,    word) {
    match(code, rule)
    word = substr(code, RSTART, RLENGTH)
    gsub(/^[^A-Za-z_0-9]|[^A-Za-z_0-9]+$/, "", word)
    return word
}

# Notes to oneself, and code that was put into a comment: it ends like a statement and reads like one.
function read_comment(text) {
    sub(/^[ *]+/, "", text)
    sub(/[ ]+$/, "", text)
    if (text ~ (START "(TODO|FIXME|XXX|HACK)" END_WORD)) complain(FNR, "a note to oneself: file an issue")
    if (text ~ /[{]$/ || text ~ /^[}][ ]*(else.*)?$/ || text ~ /[A-Za-z_0-9][(][^()]*[)];$/ ||
        text ~ /^(return|break|continue|goto|if|for|while)[^A-Za-z_].*;$/ ||
        text ~ /^[A-Za-z_0-9 *.>[\]-]+[-+*\/|&]?= .*;$/)
        complain(FNR, "code in a comment: delete it, git remembers")
}

# ---- Result --------------------------------------------------------------------------------------

function median(    i, j, v) {
    for (i = 2; i <= functions; i++) {
        v = lengths[i]
        for (j = i - 1; j > 0 && lengths[j] > v; j--) lengths[j + 1] = lengths[j]
        lengths[j + 1] = v
    }
    return lengths[int((functions + 1) / 2)] + 0
}

END {
    if (!symbols && total) {
        FILENAME = "rlhf.c"
        close_section(total)
        for (i = 1; i <= entries || i <= sections; i++) {
            if (toc[i] == banner[i]) continue
            if (i > sections) complain(toc_line[i], "no banner for the table's \"" toc[i] "\"")
            else complain(banner_line[i], "\"" banner[i] "\" is \"" toc[i] "\" in the table of contents")
            break
        }
        if (function_is != "") complain(header_line, function_is ": its closing brace is not at column 1")
        if (!sections) complain(1, "no section banner")
        printf "rlhf.c: %d lines, %d sections, comments %.0f %% (and beside code %.0f %%)\n", \
            total, sections, 100 * comment_lines / total, 100 * comment_beside / total
        printf "rlhf.c: %d functions, median %d lines, %d over %d, longest %d (%s)\n", \
            functions, median(), wished, MAX_WISHED, longest, longest_name
    }
    if (errors) printf "make check: %d finding%s\n", errors, (errors == 1 ? "" : "s")
    exit errors > 0
}
