"""Memory, FLOPs and speed on paper: what a training run or decoding needs on given devices, each with its formula."""
