"""One file per method: its paper, its equation, one dataclass, one score. Importing it registers all."""

from modicum.kv.policies import adakv as adakv
from modicum.kv.policies import ahakv as ahakv
from modicum.kv.policies import calibrated as calibrated
from modicum.kv.policies import caote as caote
from modicum.kv.policies import compactor as compactor
from modicum.kv.policies import criticalkv as criticalkv
from modicum.kv.policies import full as full
from modicum.kv.policies import h2o as h2o
from modicum.kv.policies import keydiff as keydiff
from modicum.kv.policies import knorm as knorm
from modicum.kv.policies import learned as learned
from modicum.kv.policies import obcache as obcache
from modicum.kv.policies import pyramidkv as pyramidkv
from modicum.kv.policies import random as random
from modicum.kv.policies import razor as razor
from modicum.kv.policies import replay as replay
from modicum.kv.policies import snapkv as snapkv
from modicum.kv.policies import streaming as streaming
from modicum.kv.policies import tova as tova
from modicum.kv.policies import triattention as triattention
