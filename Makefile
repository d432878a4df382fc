# rlhf: `make` builds the program, `make demo` shows it at work, `make help` lists the rest.
#
# Variables worth setting:  CC  CFLAGS (optimisation, -Werror)  CPPFLAGS  LDFLAGS, and
#   T=NAME               runs the tests whose name contains NAME
#   JOBS=N               compilers, and test programs, at a time
#   OPENMP=              builds without threads
#   BUILD=DIR PROG=FILE  build elsewhere, to have several builds side by side

CFLAGS ?= -O2 -g
BUILD  ?= build
PROG   ?= rlhf
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# ---- Flags ---------------------------------------------------------------------------------------

# -ffp-contract=off: results are the same bits on every machine, so the compiler fuses nothing that
# the source does not fuse.
WARN  = -Wall -Wextra -Wpedantic -Wshadow
FLAGS = -std=gnu11 -pthread $(WARN) -ffp-contract=off $(OPENMP) $(CPPFLAGS) $(CFLAGS)
LIBS  = $(LDFLAGS) $(PKG_LIBS) $(OPENMP_LIBS) -lm

# What a bench was run with.
COMMIT = -DRLHF_COMMIT='"$(shell git rev-parse --short HEAD 2>/dev/null || echo no commit)"'

# Recursive on purpose: pkg-config and the compiler are asked when a recipe runs, which on a new
# machine is after `deps` installed them; each answer is kept for the recipes that follow.
PKGS       = jansson libpcre2-8 libutf8proc zlib
PKG_CFLAGS = $(eval PKG_CFLAGS := $$(shell pkg-config --cflags $(PKGS)))$(PKG_CFLAGS)
PKG_LIBS   = $(eval PKG_LIBS := $$(shell pkg-config --libs $(PKGS)))$(PKG_LIBS)
OPENMP     = $(eval OPENMP := $$(shell $(openmp_probe)))$(OPENMP)

# Apple's clang has OpenMP in its preprocessor only; the library comes from Homebrew.
OPENMP_APPLE = -Xpreprocessor -fopenmp -I$(shell brew --prefix libomp 2>/dev/null)/include
OPENMP_LIBS  = $(if $(findstring -Xpreprocessor,$(OPENMP)),-L$(shell brew --prefix libomp)/lib -lomp)

# Prints the flags with which a program links here, or nothing: then there are no threads.
openmp_probe = t=$$$$(mktemp); echo 'int main(void) { return 0; }' >$$$$t.c; \
               if $(CC) -fopenmp $$$$t.c -o $$$$t 2>/dev/null; then echo -fopenmp; \
               elif brew --prefix --installed libomp >/dev/null 2>&1; then \
                   echo "$(OPENMP_APPLE)"; fi; rm -f $$$$t $$$$t.c

# ---- Program and library -------------------------------------------------------------------------

.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.PHONY: all lib deps deps-ci need test test-build demo interop pages deps-pages bench deps-bench check sanitize sanitize-build \
        neon clean help

all: $(PROG)              ## the program, ./rlhf
	@:
lib: $(BUILD)/librlhf.a   ## the library, build/librlhf.a
	@:

# What only the program needs. HTTP= builds it without libmicrohttpd: `rlhf label` then has --tty only.
HTTP        = yes
MAIN_CFLAGS = -I$(BUILD) -DRLHF_MAIN $(if $(HTTP),$(shell pkg-config --cflags libmicrohttpd),-DRLHF_NO_HTTP)
MAIN_LIBS   = $(if $(HTTP),$(shell pkg-config --libs libmicrohttpd))

$(PROG): rlhf.c rlhf.h $(BUILD)/page.h | need $(BUILD)
	$(CC) $(FLAGS) $(PKG_CFLAGS) $(MAIN_CFLAGS) $(COMMIT) -o $@ rlhf.c $(LIBS) $(MAIN_LIBS)

$(BUILD)/rlhf.o: rlhf.c rlhf.h | need $(BUILD)
	$(CC) $(FLAGS) $(PKG_CFLAGS) -c -o $@ rlhf.c

# The pages that the program shows in a browser, as a table of names and bytes.
PAGE_FILES = $(wildcard data/page/*.html data/page/*.css data/page/*.js)

$(BUILD)/page.h: $(PAGE_FILES) | $(BUILD)
	@{ echo 'static const struct { const char *name; const unsigned char *data; size_t size; } page_files[] = {'; \
	for f in $(PAGE_FILES); do \
	    echo "{\"$${f##*/}\", (const unsigned char[]){"; \
	    od -An -v -tu1 $$f | tr -s ' ' ',' | sed 's/^,//; s/$$/,/'; \
	    echo "0}, $$(wc -c <$$f)},"; \
	done; echo '};'; } >$@

$(BUILD)/librlhf.a: $(BUILD)/rlhf.o
	rm -f $@
	$(AR) rcs $@ $<

$(BUILD):
	mkdir -p $@

# ---- Dependencies --------------------------------------------------------------------------------

# What to look for, and what it is called by Debian and by Homebrew ("-": not packaged there).
PACKAGES = jansson:libjansson-dev:jansson libpcre2-8:libpcre2-dev:pcre2 \
           libutf8proc:libutf8proc-dev:utf8proc zlib:zlib1g-dev:zlib \
           $(if $(HTTP),libmicrohttpd:libmicrohttpd-dev:libmicrohttpd) \
           stb/stb_ds.h:libstb-dev:-

# $(call missing,N): a shell command that prints what is not there, by its N-th name. Without
# pkg-config nothing else can be looked for: to be installed is then everything, to be complained
# about is pkg-config.
missing = if ! command -v pkg-config >/dev/null; then \
              echo pkg-config $(if $(filter 1,$1),,$(foreach p,$(PACKAGES),$(word $1,$(subst :, ,$p)))); \
          else \
              for p in $(PACKAGES); do \
                  what=$${p%%:*}; \
                  case $$what in \
                  (*.h) echo "\#include <$$what>" | $(CC) $(CPPFLAGS) -E -x c - >/dev/null 2>&1 ;; \
                  (*) pkg-config --exists $$what ;; \
                  esac || echo $$p | cut -d: -f$1; \
              done; \
          fi

deps:                     ## install the packages that are missing (apt-get or brew)
	@if command -v apt-get >/dev/null; then \
	    want=$$($(call missing,2)); [ -z "$$want" ] || $(call apt_install,$$want); \
	elif command -v brew >/dev/null; then \
	    want=$$($(call missing,3) | tr ' ' '\n' | grep -v '^-$$'); \
	    [ -z "$$want" ] || brew install $$want libomp; \
	fi
	@want=$$($(call missing,1)); [ -z "$$want" ] || \
	    { echo "missing packages:" $$want "(install them with your package manager)" >&2; exit 1; }

# $(call apt_install,PACKAGES): a third-party source that fails to update must not stop the install.
apt_install = { su=; [ $$(id -u) = 0 ] || su=sudo; \
	if [ -n "$$su" ] && ! command -v sudo >/dev/null; then \
	    echo "missing packages:" $1 "(as root: apt-get install" $1")" >&2; exit 1; \
	fi; \
	echo "installing" $1 "(apt-get)"; \
	$$su apt-get update -qq </dev/null || true; \
	$$su env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $1 \
	    </dev/null >/dev/null || { echo "could not install" $1 >&2; exit 1; }; }

# Every compilation waits for this: one line that names what is missing beats a page of errors.
NEED = yes
need:
ifeq ($(NEED),yes)
	@want=$$($(call missing,1)); [ -z "$$want" ] || \
	    { echo "missing packages:" $$want "(\`make deps\` installs them)" >&2; exit 1; }
endif

# ---- Tests ---------------------------------------------------------------------------------------

# A test includes rlhf.c, so it sees private functions; how they are compiled once for all tests says
# test/inside.awk. An example is a program of a library user: rlhf.h and librlhf.a are all it gets,
# exit status 0 is its passed test.
TESTS    = $(patsubst test/%.c,$(BUILD)/%,$(wildcard test/test_*.c))
EXAMPLES = $(patsubst test/%.c,$(BUILD)/%,$(wildcard test/example*.c))
INSIDE   = $(BUILD)/inside.h $(BUILD)/inside.o

# $(call inside,FILE): compiles and links the program FILE, which includes rlhf.c.
inside = { echo '\#line 1 "$1"'; sed 's|^\#include "[./]*rlhf[.]c"|\#include "inside.h"|' $1; } | \
	     $(CC) $(FLAGS) $(PKG_CFLAGS) -Wno-unused-function -Wno-unused-const-variable -iquote test -I. -I$(BUILD) \
	         -o $@ -x c - -x none $(BUILD)/inside.o $(LIBS) $(MAIN_LIBS)

$(TESTS): $(BUILD)/%: test/%.c test/test.h rlhf.h $(INSIDE) | need
	$(call inside,$<)

$(BUILD)/inside.h: rlhf.c test/inside.awk | $(BUILD)
	awk -v view=1 -f test/inside.awk rlhf.c >$@

$(BUILD)/inside.c: rlhf.c test/inside.awk | $(BUILD)
	awk -f test/inside.awk rlhf.c >$@

$(BUILD)/inside.o: $(BUILD)/inside.c rlhf.h $(BUILD)/page.h | need
	$(CC) $(FLAGS) $(PKG_CFLAGS) $(MAIN_CFLAGS) -Wno-unused-function -Dmain=rlhf_main -I. -c -o $@ $<

$(BUILD)/test_demo: data/demo.c

$(EXAMPLES): $(BUILD)/%: test/%.c rlhf.h $(BUILD)/librlhf.a
	$(CC) $(FLAGS) -I. -o $@ $< $(BUILD)/librlhf.a $(LIBS)

# How tests run: first those that take longest.
RUN = -j $(JOBS) -f "test_real test_memory example_ppo test_gemm test_lora test_cli" -t "$(T)"

test-build: $(TESTS) $(EXAMPLES)
	@:

# test/readme.sh runs the commands of README.md with the program, and compares its table with the demo.
test: deps                ## build and run the tests (T=NAME for some of them)
	@$(MAKE) --no-print-directory -j$(JOBS) test-build all $(BUILD)/demo-tool
	@sh test/run.sh $(RUN) $(TESTS) $(EXAMPLES) test/readme.sh

# Leaks count as failures here; the quick subset, since instrumented code is several times slower.
SAN = -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: deps            ## the same under AddressSanitizer and UBSan, quick subset
	@$(MAKE) --no-print-directory sanitize-build
	@RLHF_TEST_QUICK=1 UBSAN_OPTIONS=print_stacktrace=1 sh test/run.sh $(RUN) \
	    $(patsubst $(BUILD)/%,$(BUILD)/san/%,$(TESTS) $(EXAMPLES))

sanitize-build:
	@$(MAKE) --no-print-directory -j$(JOBS) test-build BUILD=$(BUILD)/san CFLAGS="-O1 -g1 $(SAN)"

# ---- Demo ----------------------------------------------------------------------------------------

demo: deps                ## train, align, compare: the whole loop in a few minutes
	@$(MAKE) --no-print-directory -j$(JOBS) all $(BUILD)/demo-tool
	@bash data/demo.sh

$(BUILD)/demo-tool: data/demo.c | need $(BUILD)
	$(CC) $(FLAGS) $(PKG_CFLAGS) -o $@ data/demo.c $(LIBS)

# ---- Interoperation ------------------------------------------------------------------------------

# Every test/interop_*.py ends with "N passed, N failed". RLHF_TEST_QUICK=1 takes fewer strings, tokens
# and models. PIP_EXTRA_INDEX_URL, as for the bench, takes PyTorch's build for CPUs.
INTEROP = $(BUILD)/interop

interop: deps             ## files, ids and numbers against transformers, PEFT, tokenizers, llama.cpp (T=NAME)
	@$(MAKE) --no-print-directory -j$(JOBS) all $(INTEROP)/librlhf.so $(INTEROP)/tool $(VENV)/.installed
	@$(MAKE) --no-print-directory $(VENV)/.llama.cpp || \
	    echo "llama-cpp-python could not be installed; the comparison goes on without it" >&2
	@INTEROP=$(INTEROP) PROG=$(PROG) sh test/run.sh -j $(JOBS) -f interop_gguf.py -w $(VENV)/bin/python \
	    $(sort $(wildcard test/interop_*$(T)*.py))

$(INTEROP)/librlhf.so: rlhf.c rlhf.h | need
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(PKG_CFLAGS) -fPIC -shared -o $@ rlhf.c $(LIBS)

$(INTEROP)/tool: test/interop_tool.c rlhf.h $(INSIDE) | need
	@mkdir -p $(@D)
	$(call inside,$<)

# The environment outlives the clone: installing it takes minutes. Its name tells what is in it, and
# the processor.
CACHE = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/rlhf
VENV  = $(eval VENV := $$(CACHE)/interop-$$(shell $(venv_key)))$(VENV)
venv_key = { cat test/requirements-interop*.txt bench/requirements-llama.cpp.txt; $(PYTHON) --version; \
             echo '$(LLAMA_ANY)'; grep -m 1 flags /proc/cpuinfo || uname -m; } | cksum | cut -d ' ' -f 1

# TRL is only read, for the names of its options: of its last release, and of the last that has PPO.
$(CACHE)/interop-%/.installed:
	rm -rf $(@D)
	@mkdir -p $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -qq -r test/requirements-interop.txt
	while read -r trl; do case $$trl in (trl*) $(@D)/bin/pip install -qq --no-deps --target $(@D)/$$trl $$trl || exit;; \
	    esac; done <test/requirements-interop-trl.txt
	touch $@

# Without llama.cpp, which is compiled, the comparison with it is left out. Neither for this very processor nor from
# pip's cache, where the bench's is: its products in tile registers (AMX) end in illegal instructions on some hosts.
LLAMA_ANY = $(LLAMA) -DGGML_NATIVE=OFF
$(CACHE)/interop-%/.llama.cpp: $(CACHE)/interop-%/.installed
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) CMAKE_ARGS="$(LLAMA_ANY)" \
	    $(@D)/bin/pip install -qq --no-cache-dir -r bench/requirements-llama.cpp.txt
	touch $@

# ---- Pages ---------------------------------------------------------------------------------------

# Every test/pages_*.py (pages_tool.py is what they share) ends with "N passed, N failed". Screenshots
# stay in build/pages.
BROWSER = $(BUILD)/pages

pages: deps-pages         ## the pages of `rlhf label` and `rlhf report` in headless Chromium
	@$(MAKE) --no-print-directory all
	@RLHF=$(abspath $(PROG)) PAGES_OUT=$(abspath $(BROWSER)) sh test/run.sh -j $(JOBS) -t "$(T)" \
	    -w $(BROWSER)/venv/bin/python $(filter-out %_tool.py,$(wildcard test/pages_*.py))

deps-pages: deps          ## install what pages needs: a browser, its driver, selenium
	@want=; \
	command -v chromium >/dev/null || want="$$want chromium"; \
	command -v chromedriver >/dev/null || want="$$want chromium-driver"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || want="$$want python3-venv"; \
	[ -z "$$want" ] || { command -v apt-get >/dev/null || { echo "missing:$$want" >&2; exit 1; }; \
	    $(call apt_install,$$want); }
	@$(MAKE) --no-print-directory $(BROWSER)/venv/.installed

$(BROWSER)/venv/.installed: test/requirements-pages.txt
	@mkdir -p $(BROWSER)
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -r test/requirements-pages.txt
	touch $@

# ---- Bench ---------------------------------------------------------------------------------------

# PEERS: whom to install and to run against.  BENCH: options of bench/run.py.
# Python's peers have an environment of their own each, the libraries of products a program each.
PYTHON ?= python3
PEERS   = torch openblas blis onednn trl llama.cpp
BENCH   =

bench: deps-bench         ## speed against the peers on the same work (PEERS=NAMES BENCH=OPTIONS)
	@$(MAKE) --no-print-directory all
	@CC="$(CC)" $(PYTHON) bench/run.py --program $(abspath $(PROG)) --build $(BUILD) \
	    $(if $(findstring --peer,$(BENCH)),,$(addprefix --peer ,$(PEERS))) $(BENCH)

PEER_VENVS = $(patsubst %,$(BUILD)/bench-%/.installed,$(filter torch trl llama.cpp,$(PEERS)))
PEER_GEMMS = $(patsubst %,$(BUILD)/gemm-%,$(filter openblas blis onednn,$(PEERS)))

# A peer that cannot be had here is no reason to do without the others.
deps-bench: deps          ## install what bench compares with (PEERS=NAMES)
	@[ -z "$(filter torch trl,$(PEERS))" ] || ! command -v apt-get >/dev/null || \
	    ls /usr/lib/*/libjemalloc.so.2 >/dev/null 2>&1 || $(call apt_install,libjemalloc2)
	@$(MAKE) --no-print-directory -k $(PEER_VENVS) $(PEER_GEMMS) || \
	    echo "not all peers could be installed; the bench goes on without them" >&2

# llama.cpp is compiled: only the library, for this processor.
LLAMA = -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF

$(BUILD)/bench-%/.installed: bench/requirements-%.txt | $(BUILD)
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) CMAKE_ARGS="$(LLAMA)" $(@D)/bin/pip install -q -r $<
	touch $@

# A peer's library and Debian's package of it.
PEER_openblas = openblas libopenblas-dev
PEER_blis     = blis libblis-openmp-dev
PEER_onednn   = dnnl libdnnl-dev

$(BUILD)/gemm-%: bench/peers/gemm_peer.c | $(BUILD)
	@echo 'int main(void) { return 0; }' | $(CC) -x c - -o $@ -l$(firstword $(PEER_$*)) 2>/dev/null || \
	    ! command -v apt-get >/dev/null || $(call apt_install,$(lastword $(PEER_$*)))
	$(CC) $(FLAGS) -DPEER_$(shell echo $* | tr a-z A-Z) -o $@ $< -l$(firstword $(PEER_$*)) $(LDFLAGS) $(OPENMP_LIBS) -lm

# ---- Checks --------------------------------------------------------------------------------------

CHECKED = rlhf.c rlhf.h $(wildcard test/*.c test/*.h bench/peers/*.c data/*.c)

# First the text, which takes no compiler, then what the library's object shows to its host.
check:                    ## the rules of rlhf.c: structure, limits, symbols
	@LC_ALL=C awk -f test/check.awk $(CHECKED)
	@$(MAKE) --no-print-directory -s $(BUILD)/rlhf.o
	@{ nm -g --defined-only $(BUILD)/rlhf.o; nm -u $(BUILD)/rlhf.o; } | awk -v symbols=1 -f test/check.awk

# ---- aarch64 -------------------------------------------------------------------------------------

# The NEON code, cross-built and run under qemu-user. The libraries are Debian's arm64 packages,
# unpacked into the build folder: installing them beside the host's would tie the versions of both.
CROSS   = aarch64-linux-gnu-
ARM     = $(BUILD)/arm64
SYSROOT = $(ARM)/sysroot
QEMU    = qemu-aarch64 -L /usr/aarch64-linux-gnu
NEON_TESTS ?= $(filter $(addprefix $(BUILD)/test_,kern gemm ops model bits),$(TESTS))
NEON_RUN    = $(patsubst $(BUILD)/%,$(ARM)/%,$(NEON_TESTS))

ARM_PACKAGES = libjansson-dev libpcre2-dev libutf8proc-dev zlib1g-dev libstb-dev

# apt works on a private state here: no root, and the host's own package lists stay as they are.
APT_ARM = apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
	  -o Dir::State=$(abspath $(ARM))/apt -o Dir::State::status=$(abspath $(ARM))/apt/status \
	  -o Dir::Cache=$(abspath $(ARM))/apt/cache

$(SYSROOT)/.unpacked:
	@rm -rf $(SYSROOT) $(ARM)/apt $(ARM)/deb
	@mkdir -p $(SYSROOT) $(ARM)/apt/lists/partial $(ARM)/apt/cache/archives/partial $(ARM)/deb
	@: > $(ARM)/apt/status
	@echo "unpacking $(ARM_PACKAGES) (arm64)"
	@$(APT_ARM) update || true
	@cd $(ARM)/deb && $(APT_ARM) download $(ARM_PACKAGES)
	@for d in $(ARM)/deb/*.deb; do dpkg-deb -x $$d $(SYSROOT) || exit 1; done
	@touch $@

neon: deps-ci $(SYSROOT)/.unpacked  ## cross-build for aarch64, run the kernel tests under qemu
	@$(MAKE) --no-print-directory -j$(JOBS) $(ARM)/rlhf $(NEON_RUN) BUILD=$(ARM) PROG=$(ARM)/rlhf NEED=no HTTP= \
	    CC=$(CROSS)gcc OPENMP=-fopenmp PKG_CFLAGS="-isystem $(SYSROOT)/usr/include" \
	    PKG_LIBS="-L$(SYSROOT)/usr/lib/aarch64-linux-gnu -ljansson -lpcre2-8 -lutf8proc -lz"
	@$(QEMU) $(ARM)/rlhf info
	@RLHF_TEST_QUICK=1 sh test/run.sh $(RUN) -w "$(QEMU)" $(NEON_RUN)

# Tools that only continuous integration needs: the second compiler, the cross compiler, the emulator.
deps-ci: deps             ## install what .ci/run needs beyond deps
	@want=; \
	command -v clang >/dev/null || want="$$want clang"; \
	command -v clang >/dev/null && echo 'int main(void) { return 0; }' | \
	    clang -fopenmp -x c - -o /tmp/rlhf-omp.$$$$ 2>/dev/null || want="$$want libomp-dev"; \
	rm -f /tmp/rlhf-omp.$$$$; \
	command -v qemu-aarch64 >/dev/null || want="$$want qemu-user"; \
	command -v $(CROSS)gcc >/dev/null || want="$$want gcc-aarch64-linux-gnu libc6-dev-arm64-cross"; \
	[ -z "$$want" ] || { command -v apt-get >/dev/null || { echo "missing tools:$$want" >&2; exit 1; }; \
	    $(call apt_install,$$want); }

# ---- Housekeeping --------------------------------------------------------------------------------

clean:                    ## remove everything that make wrote
	rm -rf $(BUILD) $(PROG)

help:                     ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | \
	    while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done
