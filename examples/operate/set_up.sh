#!/usr/bin/env bash
# Makes the folders that compose.yaml mounts, from records/north/ and records/south/, each with a file records.parquet.
# FEDPEFT runs fedpeft: by default in the image, in a container that has only what it is given.
set -euo pipefail
cd "$(dirname "$0")"
export FEDPEFT_USER="${FEDPEFT_USER:-$(id -u):$(id -g)}"

for name in north south; do
    [ -f "records/$name/records.parquet" ] || { echo "records/$name/records.parquet is missing" >&2; exit 2; }
done
mkdir -p state/coordinator state/north state/south

docker compose build coordinator north
docker compose run --rm --no-deps coordinator server init /coordinator --host coordinator
for name in north south; do
    # The way of the certificate and of the key is a folder here; between machines it is one that nobody can tamper with.
    docker compose run --rm --no-deps --volume "$PWD/state/coordinator/ca.crt:/ca.crt:ro" "$name" \
        site init /site --name "$name" --server coordinator:9092 --ca /ca.crt --data /records/records.parquet
    docker compose run --rm --no-deps coordinator server add-site /coordinator "$name" "$(cat "state/$name/site.pub")"
done
echo "Read state/north/policy.yaml and state/south/policy.yaml, then: docker compose up --detach"
