import torch
from threestudio.models.prompt_processors.embedding_cache import EmbeddingCache


def test_what_is_written_is_read(tmp_path):
    cache = EmbeddingCache(tmp_path / "deep" / "er", "model-1")
    value = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert cache.read("a cube") is None
    cache.write("a cube", value)
    assert torch.equal(cache.read("a cube"), value)
    assert [p.suffix for p in cache.folder.iterdir()] == [".safetensors"]


def test_model_and_prompt_are_both_part_of_the_key(tmp_path):
    first, second = EmbeddingCache(tmp_path, "model-1"), EmbeddingCache(tmp_path, "model-2")
    first.write("a cube", torch.zeros(1, 1))
    assert second.read("a cube") is None
    assert first.read("a cube ") is None


def test_a_damaged_file_is_computed_again(tmp_path, caplog):
    cache = EmbeddingCache(tmp_path, "model-1")
    cache.write("a cube", torch.zeros(1, 1))
    cache.path("a cube").write_bytes(b"cut")
    assert cache.read("a cube") is None
    assert "is damaged; computing it again" in caplog.text
    cache.write("a cube", torch.ones(1, 1))
    assert cache.read("a cube").item() == 1


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    EmbeddingCache(tmp_path / "file" / "cache", "model-1").write("a cube", torch.zeros(1, 1))
    assert "Text embeddings are not cached" in caplog.text
