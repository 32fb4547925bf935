"""What each shell is told once: whom to ask at a key press, and what to do with the answer. Without one it completes files."""

from __future__ import annotations

from deploy.completion import ASKING_SHELL

_BASH = f"""\
_pdserve() {{
    local IFS=$'\\n'
    COMPREPLY=($({ASKING_SHELL}=bash pdserve "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null))
}}
complete -o default -F _pdserve pdserve
"""

_ZSH = f"""\
#compdef pdserve
_pdserve() {{
    local -a found
    found=("${{(@f)$({ASKING_SHELL}=zsh pdserve "${{(@)words[2,CURRENT]}}" 2>/dev/null)}}")
    if [[ -n "${{found[1]}}" ]]; then
        _describe pdserve found
    else
        _files
    fi
}}
if [[ "${{funcstack[1]}}" = _pdserve ]]; then
    _pdserve "$@"
else
    compdef _pdserve pdserve
fi
"""

_FISH = f"""\
function __pdserve_complete
    set -l words (commandline -opc)
    set -e words[1]
    set -l current (commandline -ct)
    set -l found ({ASKING_SHELL}=fish pdserve $words "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c pdserve -f -a '(__pdserve_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
