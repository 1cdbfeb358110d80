# Asks snapback what completes the word at the cursor (bash 4.4 and later).
_snapback() {
    local line=${COMP_LINE:0:COMP_POINT} words=() word before=
    # bash splits at = : and @ as well: what lies side by side on the line is one word here.
    for word in "${COMP_WORDS[@]:0:COMP_CWORD}"; do
        if [[ ${#words[@]} -gt 0 && $line == "$word"* ]]; then
            words[-1]+=$word
        else
            line=${line#"${line%%[![:space:]]*}"}
            words+=("$word")
        fi
        line=${line#"$word"}
    done
    if [[ -z $line || $line == [[:space:]]* ]]; then
        words+=("${line#"${line%%[![:space:]]*}"}")
    else
        words[-1]+=$line
    fi
    # readline replaces what it takes for the word alone, and keeps what lies before that.
    [[ ${words[-1]} != *"$2" ]] || before=${words[-1]%"$2"}
    before=${before//[\"\'\\]/}
    words=("${words[@]//[\"\'\\]/}")
    mapfile -t COMPREPLY < <(_CLAP_IFS=$'\n' _CLAP_COMPLETE_INDEX=$((${#words[@]} - 1)) @VARIABLE@=bash \
        @PROGRAM@ -- "${words[@]}")
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    # A file is quoted where it has to be. Behind a directory, or what a value follows, the word goes on.
    [[ ! -e ${COMPREPLY-} ]] || compopt -o filenames 2>/dev/null
    [[ ! ${COMPREPLY-} =~ [=/:]$ ]] || compopt -o nospace 2>/dev/null
}
complete -o bashdefault -o nosort -F _snapback @NAME@
