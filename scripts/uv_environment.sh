# Sourced by the scripts that call uv: what pip on this machine already knows.
# uv does not read pip's setting for local wheel folders.
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
# The machine's own certificates, as pip uses them: some networks need one that uv does not bring.
[ -d /etc/ssl/certs ] && export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}
export UV_LINK_MODE=${UV_LINK_MODE:-copy}
# Not uv's default of 30 s: the wheels of torch are hundreds of megabytes.
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-600}
