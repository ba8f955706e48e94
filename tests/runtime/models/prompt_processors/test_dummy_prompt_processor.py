import threestudio


def test_any_prompt_is_one_token_of_zeros_and_no_model_is_needed():
    cls = threestudio.find("dummy-prompt-processor")
    output = cls({"prompt": "whatever"})()
    assert output.text_embeddings.shape == (1, 1, 1)
    assert output.text_embeddings_vd.abs().sum() == 0
    assert cls.required_models({}) == []
