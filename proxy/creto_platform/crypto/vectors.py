"""The published test vector of id-MLDSA65-Ed25519-SHA512, part of every start-up self-test.

Source: draft-ietf-lamps-pq-composite-sigs, appendix "Test Vectors" (no context; seeds of both halves, message,
signature). The public key is derived from the seeds, so a wrong derivation fails the verification too.
"""

from __future__ import annotations

import base64
from typing import Final

COMPOSITE_SEED: Final = base64.b64decode(
    "15uFQa8YW3u2HqmcMC3xHSt2DLiqHQYovoiCqC2HWJyEIQy28ZxuuzKZK1lEDrf01cddUOvhwY9V7RboVl41KQ=="
)
COMPOSITE_MESSAGE: Final = b"The quick brown fox jumps over the lazy dog."
COMPOSITE_SIGNATURE: Final = base64.b64decode(
    "ErzvJD1/RZozULzja0qsUZXM68/9dw+eQiLH+t6T9GLw5qHRKL0j1VJrlnAI20UB9a4vzyTNrBFO5HnWmuec4qr2EJEJqo/gTPoMJaGly6Hs5JYYXU"
    "r1MudeZNY0J/suGMRC01yJnn7eaXQ7ncA0g4vWcppItU+r9CU8LND2Z7MMA1IdVRv+euFpP5koQvDvOpCTzuentuQJJ5tBTTJCJUPh21lJJNz+LmfS"
    "C9+3Uah0obuLM3Q3LybM8xxpQA/tN2i4hoZxV/kTRocI4gNUt7vsZbYd1axPkcvBy7hhY0PPjghKv/wqfhKakp/Pq6QwYZ6wA2/pDVi6p8BrxOTsqn"
    "MIYVZOtjN+lkV1ZSsBzhXAdBV9xmzAGczB15WgoYV5+B6GXQvnOQe3HcQKhaXRRNN10JoM3eXKqi3YaYh4liVoE3MdE+mX8wIbwNZ/nfwnIqjl+BU3"
    "Ah5ArckiapJg1gSYJcmyx5oUMwjP3HBn4gaWNU7KjLmuG3fSRnIYnwWxkhk20x4S8ICNveSdjIxYKQELvIVPqdLW9Vh+5hsx5rQoe4lS2ccx8Fb/5Z"
    "ZHKJnzZmIcVFDiubx5TA1mZq5pYnG0YmQUA3JudGsDp8Ja7+xDQUEgDuoVHKMDeq8U2E/Czl1MmIB5voWQXaBSJY0kizbgfLtMqiSL4POcM/8hT2wc"
    "iyj/AKcTIrTulRnyl5re0uYWlbVdybaRLZ/FHt2EVh60Yh07k63aqteoiLdMlF3SFSQtUd2FNHhLGcjq/e0nNjK0vbvVCicgt7ZaE9WvCZIe1e6LFt"
    "hdgmFy21r2cU3yDtO/nSLOrqs9aABdl7G4ny4fDOOdXOgzJ8Iwb7RTG6pQdiPuhp/GsCO97K5wXEX2BPVsU4SgEBfwnEestr241BEU/E/3YXy3gRkM"
    "s1IRZMMJJGcJfT1BqbtOzIXRq2BNqjMi5PHUi/RPewFrkK53HtHqTxVeWKR+QgAcUpWVs9PiFkGiLh0OOG9uW5bLbRt0rE1GKIOg3XABr1jU54qz0Y"
    "mR0ETk725nBEXfutjUqG/njtqlvdalfJ2qSE/9b6coHpKmTHTZDeOPM/T6ABeA3xWe75d0xQv2eQxts0RMOHHaHCfI0JFFaXsnvXPwP6vneELRer4B"
    "T44RlOJ6CUSvmwcZ1KEaX89WClonUDrZzds2dQtVjukNkQCJ4YxqmmtGCRfD5fN+z5FCN8Vn+dke4XyADwC/RJVFVloOpvef5wC78Ol4otWC1NeBJ2"
    "PK2OFly8D/OasBbnCYjRpwx07Hf6hwFyUUgHiTFZn46pXJZPWpdwgUOX7DJz3zwoL5HAWXTHcWpcAsShFjA/WenLLphqn4eTaFt+Wu3Jg9Q3ds+t7r"
    "KGczO7083oZGGYX4vhYSx0laS5Q4fY7EatiAjs0ZIuDmfmFuOzdNjmRGdK2IqAwtIH+sxHylZoz5GWfEra60U9SPpsrSqK2jIGpGURZIb9uNUYeE42"
    "2Ig2BlgHFS27b6x+320r6ftoOKbOSu54nSSq6JW0KwsDMj6Y9UpJfcllwUPRCLeFTRcrAdo2UkghFQNR6wtVpL5ir8lSRUDPzqiBYoltGCbwPhE1b6"
    "IWFwsfR+qEo806GhNVJNMqiiQGn/YYHoT/EwlnaPzMPy2YA4EGtBbuDQAQnQ6Fg0tfTwagjAiR0rF88dS/504qUzban6jYKT/hqdRuee8iZ/SN8Yux"
    "TO9SXhs5p8s8PouXPtFfasCIhQ4S+bUygi5sUcdaaRiXpj1IR2HxiEbbAUBF9s/3ZijJdaD/v+tyQgMgkmELxcaCSbeZYpp96MlEHV9fwKQT7bHV9h"
    "Z5/1jZ30dZbrsOtmzx5oFzIzoXmz+Q47q0+MgS5YTmJZEQx1nJUfqOkq6CCS5snwWNPG+VirsHeE8Siq442uR2Rr37FB1YSAL6PmzK9Wng4M2dVj7O"
    "L6HDPBcJL8nKmX0FIhIkMo9Gl+wXyM53EyjQnRWQROB+ybSz9VmzBItka3pP04ng0mhXrw+PiiVUzFVyqVGTO/vajdppu8Zrhcvd0BLzC9JoeZhI9s"
    "VSEzbs5OyRd3jtr7eOLFrpAbfcSN2w0Mg5q1Hih30FePkaN3U23p+X00nnJscYNXBpvBnryirk0RqfVRtuAXk5zySd+ggIWEqoI/oIj1X6i66zprEl"
    "CHwro4/VT6fpPP0rl7rfL5aNFgjKQtXj+5t8CMkX1pio+TatZa1LTDs5foGtryL3PThwhrVIotvhm9R4BPUqcp8V4mSCGAeBR/d8b+4Oo7ZBHU8l3x"
    "o70K/euK5KinTZSd6eXfAskkUOvwSdXemLtt61myrMoIRcEHbu7iSsbPltYTVNhNEhr5HHpBlysmpaRA37hIDDFxVATYLKApdP+MK/VxRqP1Z6SMzS"
    "LKI8kyAXC/NMXdsk7yeRL2xafVbt3l/aNk+OC5oDFdTAVtbsoCFoISta1hAYt7m0ORp4JQ9F+clJnuAdlCmpL+EiKgLAJzBwP1z1Hbue6XbbGM+RC2"
    "ycb45fdaIqNY8ofkhbYUZZzKli7mqJ6Ue0zmHCTuP8dEbaLVTKmqWcku507Lt/UOqSqHuSW1BnN+r477uVX9PF7R4XpAWPxmvO/nPiMjsHXF3cWlev"
    "dqpRrrvKNMd3uAmtLFrXuLLW+SdTl4P/PMdw2E8Ay8LrH4GDU27iXIS3w/ERwVG1YUA2gLHDB5pqxOXUH5pWhZYvFbvqo0ZtcgHjdqD4Yolp4G7Xv1"
    "QSi0xGNFET/N5nw7tdQHpAt2klQ1TyNr1YU7j0x2WyTblziy/JiwT+TVL7My0VejgTGDonWggzhuaFYoUxlHfiukgSYdh5KwJYA1vlKqpGso2s/9en"
    "KMPNpj3wKxf1Z3l7NZ/RBBU4GvLZXCd+qzzwAkvdCFPH4YGEWGVh0+A6l+zeB7Wi9QJoWNXjRZgFvd/iNcpfRDdsTr/jKBXj+a1v1PwRbn39RZF3Ao"
    "KpS1F7oW039UObkPS7qHaS//cKrU3SPO+q7DZQuhYKkO9xmWUzCQRnftahCpH55W/l3tW40lQh6mCHWE7jebNwtLEXXxwPvPGzaFCn4C5FOs6KYlgY"
    "S0DNPJqByu155bP5ZffTc/gAulUFqATGfSGLo0t5xRNYGEbEoEqQFd/fXW3wCcfupnLlrqhVE/uXRbidVGpO2KGirVpEtGlqAcjZxGKT8oAWLYcGeu"
    "ZbYk+fk8pI/nyaFYWgbsabOpjaYniUu282a6EAf5WYeqGuvb0HC5IkCitfdSYKQ5XC02mO7+HEkp8n5uSOEfFMcBKQvg0y7h8I9O49sIkXD6dRbagD"
    "jB4FMDNsOynXMJMIHycNxi2LXj5X/kn07uDLv4G55fW6d/Mh0tZehiodU0qnHOpUE5BONmAjXo7c9KNhgUDf0vYgEml4/g50NntwR1pt3qO/hFTxUr"
    "DYtpXf9mSVeEHjHYfyidj/8j6ByWVL8VSCYK2kwDf7JC2GEq6SBRggNV3FjHrMD48DJlQrhp9p5eL2uBq/vmJwPItLmxoNQl82xELQfRej2TPp2Edd"
    "wG+d5jGV8ht2Zp9n2HzmOnNPhqoo5iA0x7OCj8M5IUZiFiiaWOrw/nJ9w7x34bmEqDMJlAkvVTkSE0BpIRNV5cfM/F2mK3dwCJlc6HYTHtVifs4VTY"
    "gh3CVubWqkYTwcmFfLdUJRmfNRctfZHo4lV0G6AKmDva41ky1sLw2guZm/MphwozOWsPPwtO6T2tSdtkVzveWGSkuVUbm5tCNAAuLZi9lbYz1wQJ32"
    "q6c8lhsjqaBp2xNsszkXQB71dBeyIiQPDTzFBn0l1/Z9cC+4EdvNbznqnZNEEtQ8hRnzqGkia1qzAuC9djU2o+/IG3/PYaS1Pc/ftx/+3wol2LmTww"
    "PwKRf/b+w2Lq4ATP1cIYwLIMRulhzEuwkwWEwwhy8lh/7h3jaiLRux4g2hxpWe5Nw6hfSpyJPEgQFO3O6IPXRpnhSV0ms7q+BsP3gyYtN8m6OCoSd1"
    "zzWxRVVg6m0LHVLR45gvpL7iptDvu3Iu9JoCVmsu06OBPqQCGuU7VloHYrpAlNe5S5MKk9RvVgPdgeHqd3ANVtyITVQL9d30iQNPt3myDgVyEsUvZI"
    "vpaswg8XZTVFQWlrDWiLf9o1W5RzSEsfbwimtvd3R8amsNWDYhHeXXWxcO4axiwEsJm9EIU1Y7lCZCr8+Txl4yN9ObJ9qy6P2Y5QSwmTMK0lTAwNW1"
    "zRq5T8vofr4NVxc9j1vk2OoKugxzJ0fBwZWWKuKGF/hRnHz0BuJIek9q3DCDmXWHhScdmqJluy9nt+lfSTYKLHetQUckD/D1GxrRao9uF4vMBEIEEQ"
    "RE6it+gFSHaa5QEMInB0k62wuvVfa5ed1RVHgLYhPUZ/rvsAAAAAAAAAAAAAAAAAAAAAAAAABgsVGh4ks97zPavKFDAT5yFTP08cXUMt4AGzDEUkJZ"
    "cfsvUPX6wC+iSqIjEsSFnvvvUGbIr/q/xpHBHvjBu+wXilMlBVBg=="
)
