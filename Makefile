# Everything the tests need is set up and built from here; `cargo build` alone
# needs none of it.

.DEFAULT_GOAL := help
.PHONY: help setup guest debian s3s prepared test newer newest openqa stores python loom miri torture soak demo bench fmt lint deny
.PHONY: man docs tutorial tutorial-clean howtos deb deb-test reproducible package static minimum sbom clean

help:
	@echo "make setup   install QEMU 7.2 and the build tools by apt (asks for root);"
	@echo "             unpack QEMU 10.0, libvirt 11.3 and guest kernels into .deps (or SNAPBACK_DEPS)"
	@echo "make guest   build the test guests"
	@echo "make debian  build the disk of the guest with a database (asks for root)"
	@echo "make s3s     build the S3 server of the tests"
	@echo "make test    set up, then run all tests"
	@echo "make newer   run the tests of libvirt with libvirt 11.3 and QEMU 10.0"
	@echo "make newest  run the tests of guests with QEMU 11.1, which it unpacks"
	@echo "make openqa  run os-autoinst of Debian 13 with its own milestones and by snapback (asks for root)"
	@echo "make stores  run a round of a guest in stores of each kind beside S3, which it unpacks and starts"
	@echo "make python  check, build and test the Python client, without a daemon"
	@echo "make loom    try every interleaving of the page claims"
	@echo "make miri    run under Miri what needs no kernel (installs a nightly toolchain)"
	@echo "make torture revert a guest 200 times, each with a fault; measure takeovers;"
	@echo "             kill a daemon 50 times; reset guests 100 times each under load;"
	@echo "             list, forget and prune a repository of 1,000 snapshots;"
	@echo "             revert from a store 100 times, each with a fault of the network"
	@echo "make soak    revert a guest 1,000 times, and look for what grows"
	@echo "make demo    set up, then show an instant revert"
	@echo "make bench   set up, then run the benchmarks"
	@echo "make man     write manual pages to target/man"
	@echo "make docs    build the documentation as a book in target/book, its links checked"
	@echo "make tutorial    run every command of docs/tutorial.md (asks for root)"
	@echo "make tutorial-clean  the same with the package, in a Debian 12 and 13 with nothing else (asks for root)"
	@echo "make howtos  run the commands of the other pages on real guests (asks for root)"
	@echo "make deb     build the Debian packages in target/debian"
	@echo "make deb-test    install, use, upgrade, remove and purge them in a clean Debian 12 and 13 (asks for root)"
	@echo "make reproducible    build the package twice, in two folders, and compare"
	@echo "make package check what cargo would publish"
	@echo "make static  build the program without shared libraries, and try it in an empty root (asks for root)"
	@echo "make minimum hold the oldest Rust against the crates in use, and compile with it where it is there"
	@echo "make sbom    write a bill of materials (CycloneDX) to target/snapback.cdx.json"
	@echo "make fmt     format all Rust sources"
	@echo "make lint    check formatting and run clippy, warnings as errors"
	@echo "make deny    check licences, sources and advisories of the crates in use"
	@echo "make clean   remove what was built and set up here; installed packages stay"

setup:
	@scripts/setup.sh

guest: setup
	@scripts/guest.sh

debian: setup
	@scripts/debian.sh

s3s: setup
	@scripts/s3s.sh

# What the tests need. Each waits for something else, the network or one processor, so they go side by side.
prepared: setup
	@$(MAKE) --no-print-directory --jobs 3 --output-sync=target guest debian s3s

test: prepared
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target loom python
	cargo test --manifest-path tests/guest/Cargo.toml --target-dir $(GUEST_TARGET) --locked
	cargo test --locked --features $(FEATURES) --lib --bins --examples --tests
	SNAPBACK_TEST_PLACE=socket cargo test --locked --features $(FEATURES) --test e2e -- $(BOTH_WAYS)
	cargo test --locked --features $(FEATURES) --doc

newer: guest debian
	SNAPBACK_TEST_LIBVIRT_NEWER=1 cargo test --locked --features $(FEATURES) --test libvirt

newest: prepared
	@scripts/newest.sh
	SNAPBACK_TEST_NEWEST=1 cargo test --locked --features $(FEATURES) --test e2e -- $(NEWER_ONLY)

openqa: guest
	cargo build --locked --release --bin snapback
	@scripts/openqa.sh target/release/snapback

stores: guest
	@scripts/stores.sh cargo test --locked --features $(FEATURES) --test e2e -- --ignored stores::

python:
	@scripts/python.sh

loom:
	RUSTFLAGS="--cfg loom" cargo test --release --manifest-path tests/loom/Cargo.toml --target-dir $(LOOM_TARGET) --locked

torture: prepared
	$(LONG_TEST) torture::many_faults
	$(LONG_TEST) torture::how_long_a_guest_waits_for_the_next_server
	$(LONG_TEST) killed_daemon:: mapped_memory
	$(LONG_TEST) on_qemu_7
	cargo test --locked --features $(FEATURES) --test e2e -- --ignored --nocapture direct_reading:: changed_since::
	SNAPBACK_TEST_EVERY_STEP=1 SNAPBACK_MOMENTS=20 cargo test --locked --features $(FEATURES) --test e2e -- --include-ignored --nocapture killed:: save_under_fire:: moments::
	$(LONG_TEST) far::
	SNAPBACK_TEST_EVERY_BIT=1 cargo test --locked --release --features $(FEATURES) --lib -- tests_of_bits::
	cargo test --locked --release --features $(FEATURES) --test repository -- --ignored --nocapture --test-threads 1
	SNAPBACK_RESETS=100 cargo test --locked --release --features $(FEATURES) --test e2e -- --nocapture resets::

# What Miri can run, and in minutes: the rest calls the kernel or C.
MIRI := wire:: page:: rate:: identity:: memory::claim keeper::restarts keeper::protocol::tests::anything guest::command_line::parameters --skip ends_within_its_devices

miri:
	rustup toolchain install nightly --profile minimal --component miri --component rust-src
	PROPTEST_CASES=8 MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --locked --lib --target-dir $(MIRI_TARGET) -- $(MIRI)

soak: guest
	$(LONG_TEST) soak::

demo: guest
	cargo run --locked --release --example demo

bench: prepared
	cargo bench --locked --features $(FEATURES)

fmt:
	@rustfmt $(RUST_FILES)

lint:
	@rustfmt --check $(RUST_FILES)
	cargo clippy --locked --lib --bins -- -D warnings
	cargo clippy --locked --all-targets --features $(FEATURES),manual -- -D warnings
	cargo clippy --locked --manifest-path tests/guest/Cargo.toml --target-dir $(GUEST_TARGET) --all-targets -- -D warnings

deny:
	@scripts/deny.sh

man:
	cargo run --quiet --locked --features manual --bin snapback-manual target/man

docs:
	@scripts/docs.sh

tutorial: setup
	cargo build --locked --release --bin snapback
	@scripts/tutorial.sh target/release/snapback

tutorial-clean: deb
	@scripts/tutorial_clean.sh

howtos: guest
	cargo build --locked --release --features libvirt --bin snapback
	@scripts/howtos.sh target/release/snapback

deb: setup
	@scripts/deb.sh

deb-test: deb guest
	@scripts/deb_test.sh

reproducible: setup
	@scripts/reproducible.sh

package:
	@scripts/package.sh

static:
	@scripts/static.sh

minimum:
	@scripts/minimum.sh

sbom:
	@mkdir -p target
	@/usr/bin/python3 scripts/sbom.py libvirt >target/snapback.cdx.json

clean:
	cargo clean
	rm -rf $(addprefix $(DEPS)/,$(MADE))

# Tests wait a good part of their time, for guests and for limits: one more than there are processors
# keeps these busy.
export RUST_TEST_THREADS ?= $(shell expr $$(nproc) + 1)

# What the tests need beside what a bare `cargo build` builds.
FEATURES := internals,libvirt

# Tests of guests, but those on the oldest QEMU.
NEWER_ONLY := --skip on_qemu_7

# Tests in which it matters by which way memory reaches the guest. That way does not depend on QEMU's version.
BOTH_WAYS := backends:: bare:: filling:: interrupts:: journeys:: serving:: $(NEWER_ONLY)

# A test that takes many minutes, by the program as its users get it.
LONG_TEST := cargo test --locked --release --features $(FEATURES) --test e2e -- --ignored --nocapture

# Every source, by name: `cargo fmt` finds the files of no module that a macro
# declares, and lib.rs declares nearly all so.
RUST_FILES = $(shell git ls-files '*.rs')

DEPS := $(or $(SNAPBACK_DEPS),.deps)
GUEST_TARGET := $(DEPS)/guest-target
LOOM_TARGET := $(DEPS)/loom-target
MIRI_TARGET := $(DEPS)/miri-target
# What set-up makes there, by name: the directory may hold other files.
MADE := apt arm64 bare-bookworm bare-trixie cargo-deb-3.8.0 cargo-deny-0.20.2 clean-bookworm clean-trixie debian.raw downloads guest-target initramfs.cpio kernel libvirt-11.3 lock lock-clean lock-newest lock-s3s lock-trixie loom-target mdbook-0.5.4 miri-target python openqa-itself.log openqa-snapback.log qemu-10.0 qemu-11.1 s3s-fs s3s-target stamps stores trixie vmlinux vmlinuz
