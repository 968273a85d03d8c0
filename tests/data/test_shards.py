import json

import numpy as np
import pytest

from dsv2.data.shards import ShardWriter, TokenShards, refuse_foreign_files
from dsv2.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path, write_shards):
    documents = {"en": [[0, 5, 6, 1], [0, 7, 1], [0, 8, 8, 8, 1]], "code": [[0, 9, 1]]}
    write_shards(tmp_path / "shards", documents, shard_tokens=6)
    return tmp_path / "shards"


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, **options) -> str:
    with pytest.raises(DataError) as caught:
        TokenShards.open(folder, **options)
    return caught.value.message


def test_what_is_written_is_read(folder):
    shards = TokenShards.open(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "code-00000.bin", "code-00000.idx", "en-00000.bin", "en-00000.idx", "en-00001.bin", "en-00001.idx", "manifest.json"]  # fmt: skip
    assert shards.domains == ("code", "en")
    assert [tokens.tolist() for tokens in shards.tokens("en")] == [[0, 5, 6, 1, 0, 7, 1], [0, 8, 8, 8, 1]]
    assert [tokens.tolist() for tokens in shards.tokens()] == [[0, 9, 1], [0, 5, 6, 1, 0, 7, 1], [0, 8, 8, 8, 1]]
    assert [shard.document_starts.tolist() for shard in shards.shards("en")] == [[0, 4, 7], [0, 5]]
    assert (shards.num_tokens(), shards.num_tokens("en"), shards.num_documents("en"), shards.num_bytes("code")) == (15, 12, 3, 3)
    assert isinstance(shards.shards()[0].tokens.base, np.memmap)  # nothing is loaded
    assert not shards.shards()[0].tokens.flags.writeable


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_ids_take_two_bytes_while_they_fit(tmp_path, write_shards, vocab_size, dtype):
    shards = write_shards(tmp_path / "s", {"en": [[0, vocab_size - 1]]}, vocab_size=vocab_size)
    (tokens,) = shards.tokens()
    assert tokens.dtype == dtype
    assert tokens.tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("wrong", [384, -1])
def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_left(tmp_path, wrong):
    with (
        pytest.raises(DataError, match=f"token id {wrong} is outside the vocabulary of 384"),
        ShardWriter(tmp_path / "s", "f", 384, eos_id=1) as writer,
    ):
        writer.add("en", [0, wrong], 1)
    assert list(tmp_path.iterdir()) == []


def test_domain_names_cannot_choose_the_file(tmp_path, write_shards):
    names = ["../../etc", "a/b", "a b", "A b", "中文", "…", ""]
    shards = write_shards(tmp_path / "s", {name: [[0, number]] for number, name in enumerate(names)})
    assert set(shards.domains) == set(names)
    assert [next(shards.tokens(name)).tolist() for name in names] == [[0, number] for number in range(len(names))]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_too_many_domains(tmp_path):
    with (
        pytest.raises(DataError, match="more than 256 domains, the last is 'url 256'"),
        ShardWriter(tmp_path / "s", "f", 384, eos_id=1) as writer,
    ):
        for number in range(257):
            writer.add(f"url {number}", [0], 1)
    assert list(tmp_path.iterdir()) == []


def test_no_document_and_no_token(tmp_path):
    with pytest.raises(DataError, match="no document was written"), ShardWriter(tmp_path / "s", "f", 384, eos_id=1):
        pass
    with pytest.raises(ValueError, match="at least one token"), ShardWriter(tmp_path / "s", "f", 384, eos_id=1) as writer:
        writer.add("en", [], 0)
    assert list(tmp_path.iterdir()) == []


def test_numbers_out_of_range(tmp_path):
    with pytest.raises(ConfigError, match="shard_tokens = 0"):
        ShardWriter(tmp_path / "s", "f", 384, eos_id=1, shard_tokens=0)
    with pytest.raises(ConfigError, match="eos_id = 384 and vocab_size = 384"):
        ShardWriter(tmp_path / "s", "f", 384, eos_id=384)


def test_older_shards_are_replaced_and_anything_else_is_kept(folder, write_shards):
    assert write_shards(folder, {"zh": [[0, 3]]}).domains == ("zh",)
    assert len(list(folder.iterdir())) == 3
    (folder / "thesis.doc").write_text("the only copy")
    with pytest.raises(DataError, match="holds other things: thesis.doc"):
        write_shards(folder, {"zh": [[0, 3]]})
    assert (folder / "thesis.doc").exists()
    with pytest.raises(DataError, match="is a file"):
        refuse_foreign_files(folder / "manifest.json", ())


# Damage ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("name", "size"), [("en-00000.bin", 14), ("en-00000.idx", 24)])
def test_sizes_are_always_checked(folder, name, size, verify):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    assert refused(folder, verify=verify) == f"{folder / name} is cut off: {size - 1} bytes, {size} expected"
    (folder / name).write_bytes(data + b"x")
    assert refused(folder, verify=verify) == f"{folder / name} is too long: {size + 1} bytes, {size} expected"
    (folder / name).unlink()
    assert refused(folder, verify=verify) == f"{folder / name} is missing; {size} bytes expected"


@pytest.mark.parametrize("name", ["code-00000.bin", "en-00001.idx"])
def test_a_flipped_bit_is_found(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[3] ^= 1
    (folder / name).write_bytes(data)
    assert f"{folder / name} was altered: its sha256 is " in refused(folder)
    TokenShards.open(folder, verify=False)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[]", "has format None, version None"),
        (b'{"format": "dsv2-token-shards", "version": 2}', "version 2; 'dsv2-token-shards', version 1 expected"),
        (b'{"format": "dsv2-token-shards", "version": 1}', "is damaged: tokenizer_sha256: Field required"),
    ],
)
def test_damaged_manifest(folder, content, wrong):
    (folder / "manifest.json").write_bytes(content)
    message = refused(folder)
    assert message.startswith(str(folder / "manifest.json"))
    assert wrong in message


def test_manifest_cannot_point_elsewhere(folder):
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards=[entries[0] | {"name": "../secret"}])
    assert "is damaged: shards.0.name" in refused(folder)
    edit_manifest(folder, shards=[])
    assert "is damaged: shards" in refused(folder)


def test_not_a_folder_of_shards(tmp_path):
    assert "it has no manifest.json" in refused(tmp_path)
    assert "it has no manifest.json" in refused(tmp_path / "nowhere")


def test_unknown_domain_and_another_tokenizer(folder):
    shards = TokenShards.open(folder)
    with pytest.raises(DataError, match="has no domain 'fr'; its domains are code, en"):
        shards.shards("fr")
    shards.expect_tokenizer("f" * 64)
    with pytest.raises(DataError, match="with the tokenizer ffffffffffffffff, not with 0000000000000000"):
        shards.expect_tokenizer("0" * 64)


def test_the_fingerprint_tells_data_apart(tmp_path, write_shards):
    one, same, other = (write_shards(tmp_path / str(number), {"en": [[0, ids]]}) for number, ids in enumerate([5, 5, 6]))
    assert one.fingerprint == same.fingerprint != other.fingerprint
