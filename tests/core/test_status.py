"""What the status page tells."""

import asyncio

from llm import LLMManager
from llm.testing.simulator import Simulator, SimulatorSettings
from llm.testing.window import Limits


async def test_the_status_shows_what_the_vendor_says_of_a_key() -> None:
    """Its headers are read when somebody asks, so a call does not pay for them."""
    async with Simulator(SimulatorSettings(limits=Limits(requests=50))) as simulator:
        config = {
            "providers": {
                "anthropic": {"api_keys": ["key-one", "key-two"], "models": "m", "base_url": simulator.anthropic_url}
            }
        }
        async with await asyncio.to_thread(LLMManager.from_config, config, environ={}) as manager:
            await manager.get_client().chat("Hello")
            first, second = manager.get_status()["providers"]["anthropic"]["keys"]
    assert first["vendor_limits"]["requests"]["limit"] == 50
    assert first["vendor_limits"]["requests"]["remaining"] == 49
    assert second["vendor_limits"] is None
