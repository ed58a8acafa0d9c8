"""Weight quantization: scales, rounding to nearest or by GPTQ, bias correction, weight preparation."""
