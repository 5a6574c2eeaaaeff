"""Parameters of the published models whose configurations are in vision_configs, as their authors' files have them."""

PARAMETERS = {
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "vit-h14": 632_045_800,
    "resnet-50": 25_557_032,
    "clip-b32": 151_277_313,
    "clip-b16": 149_620_737,
    "clip-l14": 427_616_513,
    "clip-l14-336": 427_944_193,
    "siglip-b16-224": 203_155_970,
    "siglip-so400m-14-384": 877_960_498,
    "llava-1.5-7b": 7_063_427_072,
    "paligemma-3b-224": 2_923_466_480,
    "gemma-3-4b": 4_300_079_472,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "idefics-9b": 8_929_679_632,
}
