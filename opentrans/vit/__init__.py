"""The systems of the thesis on vision transformers: SPT, ESTA and SPViT, and what they stand on.

A leaf: nothing else imports it."""
