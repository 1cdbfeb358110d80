#!/usr/bin/env bash
# Builds the documentation as a book, target/book/index.html: docs/, the CHANGELOG and CONTRIBUTING. Every
# link of it that leads to no page or heading is an error. mdBook is put into the deps folder as PyPI has
# it, built.
#
#   docs.sh         all of that
#   docs.sh links   checks the links alone, without a book
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
deps=${SNAPBACK_DEPS:-$here/../.deps}
# shellcheck disable=SC2034 # used by common.sh
me=docs
# shellcheck source=scripts/common.sh
. "$here/common.sh"
# shellcheck source=scripts/tools.sh
. "$here/tools.sh"

cd "$here/.."
/usr/bin/python3 scripts/check_links.py README.md CONTRIBUTING.md CHANGELOG.md docs/*.md clients/python/README.md
for page in docs/*.md; do
    page=${page##*/}
    [ "$page" = SUMMARY.md ] || grep -q "]($page)" docs/SUMMARY.md || die "docs/SUMMARY.md lacks $page"
done
[ "${1:-}" != links ] || exit 0

mkdir -p "$deps"
deps=$(cd "$deps" && pwd)
mdbook
source=target/book-source
rm -rf "$source" target/book
mkdir -p "$source/src"
cp docs/*.md docs/*.json "$source/src/"
cp docs/book.toml "$source/"
for page in CHANGELOG CONTRIBUTING; do
    # They lie above docs/, and their links beside it.
    sed 's#](docs/#](#g' "$page.md" >"$source/src/$page.md"
done
# Of what else lies above docs/, only the words are in the book.
sed -i -E 's#\]\(\.\./(CHANGELOG|CONTRIBUTING)#](\1#g; s#\[([^]]*)\]\(\.\./[^)]*\)#\1#g' "$source"/src/*.md
"$mdbook" build --dest-dir "$PWD/target/book" "$source"
/usr/bin/python3 scripts/check_links.py --book target/book
say "built target/book/index.html"
