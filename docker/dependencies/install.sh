#!/bin/sh
# Installs the locked dependencies into /opt/venv and leaves no installer, cache or package tests behind.
set -eu

if [ -s /run/secrets/index ]; then
  set -a
  # shellcheck source=/dev/null
  . /run/secrets/index
  set +a
fi
if [ -s /run/secrets/ca ]; then
  export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca
fi
export HOME=/tmp/build TMPDIR=/tmp/build XDG_CACHE_HOME=/tmp/build NUMBA_CACHE_DIR=/tmp/build PYTHONDONTWRITEBYTECODE=1
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# A cache of wheels may be mounted here; without one each wheel is downloaded.
if [ -d /var/cache/uv ]; then
  export UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy
else
  export UV_CACHE_DIR=/tmp/build/uv-cache
fi

mkdir /tmp/build
python3 -m venv /opt/venv
python=/opt/venv/bin/python
"$python" -m pip install --quiet --no-compile --require-hashes --target /tmp/build/uv -r /mnt/requirements-uv.txt
# uv installs in half a minute what takes pip three; pip is the way where uv cannot reach the index.
/tmp/build/uv/bin/uv pip install --quiet --python "$python" --require-hashes -r /mnt/requirements.txt \
  || "$python" -m pip install --quiet --no-compile --require-hashes -r /mnt/requirements.txt
"$python" -m pip check
"$python" -m pip uninstall --quiet --yes pip

# Packages' own tests, and libraries for a linker that is not there.
find /opt/venv -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} +
find /opt/venv -type f -name '*.a' -delete
"$python" /mnt/build/precompile.py
# Nothing here has to become root.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +
rm -rf /tmp/build
