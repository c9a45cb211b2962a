"""Speaking: KV cache, sampler, quantized linears, engine, streaming."""
