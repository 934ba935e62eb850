"""SGLang's `Engine`: it has a loop of its own, and a stream's pieces hold all ids so far."""

import asyncio


class Engine:
    def __init__(
        self, *, model_path, dtype="auto", skip_tokenizer_init=False, context_length=None,
        max_running_requests=None, max_total_tokens=None, mem_fraction_static=None,
        disable_radix_cache=False, random_seed=None, log_level="error",
        speculative_algorithm=None, speculative_draft_model_path=None, speculative_num_steps=None,
        speculative_eagle_topk=None, speculative_num_draft_tokens=None,
    ) -> None:  # fmt: skip
        self.loop = asyncio.new_event_loop()

    async def async_generate(
        self, prompt=None, sampling_params=None, input_ids=None, return_logprob=False, stream=False
    ):
        assert set(sampling_params) <= {"temperature", "max_new_tokens", "ignore_eos"}
        if input_ids[0] == 13:
            raise RuntimeError("a prompt that begins with 13")

        async def pieces():
            for n in range(1, sampling_params["max_new_tokens"] - (input_ids[0] == 14) + 1):
                await asyncio.sleep(0.003)
                ids = [(sum(input_ids) + i) % 97 for i in range(n)]
                yield {"output_ids": ids, "meta_info": {"completion_tokens": n}}

        assert stream is True
        return pieces()
